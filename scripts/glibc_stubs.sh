#!/usr/bin/env bash
# Makes the link stubs of glibc 2.28 that wheels are linked against (python/CMakeLists.txt): a few
# hundred kilobytes, from PyPI's ziglang, which knows which glibc has which symbol. The compiler
# stays g++. Quick when they are there.
#
# usage: scripts/glibc_stubs.sh PYTHON FOLDER     PYTHON: one that has ziglang installed
set -euo pipefail

python=$1
folder=$2
version=2.28
if [ -e "$folder/libc.so" ]; then
  exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ZIG_GLOBAL_CACHE_DIR=$work/cache ZIG_LOCAL_CACHE_DIR=$work/cache
echo 'int main(void) { return 0; }' > "$work/main.c"
"$python" -m ziglang cc -target "x86_64-linux-gnu.$version" "$work/main.c" -o "$work/main"

mkdir -p "$folder"
for library in m.so.6 pthread.so.0 dl.so.2 rt.so.1 c.so.6; do # c last: it says that all are there
  cp "$(find "$work/cache" -name "lib$library" | head -n 1)" "$folder/lib${library%%.*}.so"
done
# From the system: the few functions of glibc that are linked statically, and the loader, whose
# __tls_get_addr is as old as x86-64.
ln -sf "$(g++ -print-file-name=libc_nonshared.a)" "$folder/libc_nonshared.a"
ln -sf "$(g++ -print-file-name=ld-linux-x86-64.so.2)" "$folder/libld.so"
