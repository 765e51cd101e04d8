"""How a host's answers with Quire are held against those with its own attention.

Each function takes the result with Quire, a list of the host's own and the case's limit, and
returns what it found in words; it raises MismatchError where the two do not agree.
"""


class MismatchError(Exception):
    """The answers do not agree; the message says where."""


def tokens(result, own, limit):
    """The same greedy tokens, with logprobs within the limit."""
    ours, theirs = result["answers"], own[0]["answers"]
    largest = 0.0
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        for step, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=False)):
            if x != y:
                where = f"request {number} differs at token {step}"
                raise MismatchError(f"{where}: {x}, the host's own is {y}")
            p, q = a["logprobs"][step], b["logprobs"][step]
            largest = max([largest, *(_gap(p[t], q[t]) for t in p if t in q)])
    generated = sum(len(a["tokens"]) for a in ours)
    words = f"{len(ours)} requests, {generated} tokens equal, logprobs within {largest:.1e}"
    if not largest <= limit:
        raise MismatchError(f"{words}; the limit is {limit:.1e}")
    return words


def cached(result, own, limit):
    """The same, and prompts came from the cache of prefixes."""
    words = tokens(result, own, limit)
    hits = [a["cached"] for a in result["answers"]]
    if not sum(hits):
        raise MismatchError("no token of a prompt came from the cache of prefixes")
    return f"{words}, {sum(hits)} prompt tokens cached"


def drafted(result, own, limit):
    """The same, and drafts were accepted."""
    words = tokens(result, own, limit)
    if not result["accepted"]:
        raise MismatchError(f"no drafted token was accepted ({result['accepted']})")
    return f"{words}, {result['accepted']} drafted tokens accepted"


def laid_out(result, own, limit):
    """The same, and the cache had the layout that was asked for."""
    words = tokens(result, own, limit)
    asked = result["run"]["env"]["VLLM_KV_CACHE_LAYOUT"]
    if result["layout"] not in (asked, None):
        raise MismatchError(f"the cache's layout was {result['layout']}")
    return f"{words}, strides as {result['layout'] or 'Quire chose'}"


def preempted(result, own, limit):
    """The same, and requests lost their blocks and were begun again."""
    words = tokens(result, own, limit)
    if not result["preemptions"]:
        raise MismatchError(f"no request was preempted ({result['preemptions']})")
    return f"{words}, {result['preemptions']} requests preempted"


def rounded(result, own, limit):
    """The logprobs of the host's own backend over rounded keys and values, not over exact ones.

    For one layer: a difference in the last bit can turn an element of the next one to its other
    neighbour, and after thirty layers the two are half as far apart as rounding takes them. A few
    ties there may be in one layer, too: so the average decides, as a part of what rounding changes.
    """
    largest, mean = _differences(result, own[0])
    _, effect = _differences(result, own[1])
    words = f"{_count(result)} logprobs {mean:.1e} apart on average, {largest:.1e} at most"
    words += f" (the cache's rounding changes them by {effect:.1e})"
    if not mean <= limit * effect:
        raise MismatchError(f"{words}; the limit is {limit:.2f} of that")
    if effect < 1e-6:
        raise MismatchError(f"{words}: nothing was quantised")
    return words


def no_worse(result, own, limit):
    """As near to the host's exact (fp32) logprobs as its own backend is with the same rounding."""
    _, ours = _differences(result, own[1])
    _, theirs = _differences(own[0], own[1])
    _, between = _differences(result, own[0])
    words = f"{_count(result)} logprobs {ours:.1e} from exact ones on average, "
    words += f"the host's own {theirs:.1e}, {between:.1e} between the two"
    if ours < 1e-6:
        raise MismatchError(f"{words}: nothing was rounded")
    if not ours <= limit * theirs:
        raise MismatchError(f"{words}; the limit is {limit} of the host's own")
    return words


def embeddings(result, own, limit):
    """The same vectors."""
    largest = 0.0
    pairs = zip(result["answers"], own[0]["answers"], strict=True)
    for a, b in pairs:
        elements = zip(a["embedding"], b["embedding"], strict=True)
        largest = max([largest, *(_gap(x, y) for x, y in elements)])
    words = f"{len(result['answers'])} embeddings, elements within {largest:.1e}"
    if not largest <= limit:
        raise MismatchError(f"{words}; the limit is {limit:.1e}")
    return words


def texts(result, own, limit):
    """The same text of each request."""
    pairs = list(zip(result["answers"], own[0]["answers"], strict=True))
    for number, (a, b) in enumerate(pairs):
        if a["text"] != b["text"]:
            raise MismatchError(f"request {number}: {a['text']!r}, the host's own is {b['text']!r}")
    return f"{len(pairs)} texts equal"


def _gap(x, y):
    """The distance; a NaN is far from everything."""
    return abs(x - y) if x == x and y == y else float("inf")


def _differences(result, own):
    """The largest and the average one, over the logprobs of the prompts' tokens."""
    gaps = []
    for a, b in zip(result["answers"], own["answers"], strict=True):
        pairs = zip(a["prompt_logprobs"], b["prompt_logprobs"], strict=True)
        gaps += [_gap(x, y) for x, y in pairs]
    return max(gaps), sum(gaps) / len(gaps)


def _count(result):
    return sum(len(a["prompt_logprobs"]) for a in result["answers"])
