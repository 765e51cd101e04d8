"""NaN in every block of the cache that belongs to no sequence, before and while an engine runs."""

import torch

NAN_BYTE = 0x7F  # NaN in both fp8 formats; int8 has none


class Poison:
    """Follows the pool of blocks; `blocks` counts the blocks that were filled."""

    def __init__(self, pool, caches):
        """Fills all the free blocks, and from now on every block that becomes free."""
        self.pool = pool
        self.blocks = 0
        # Layers of several groups may lie over each other: the same block is then filled twice.
        self.caches = [(cache, self._block_axis(cache)) for cache in caches if cache.numel()]
        for cache, _ in self.caches:
            self._fill(cache)
        self.blocks = pool.num_gpu_blocks
        self._free = pool.free_blocks
        pool.free_blocks = self._free_and_fill

    def _block_axis(self, cache):
        sizes = list(cache.shape[:2])
        axis = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[axis] % self.pool.num_gpu_blocks:
            shape, blocks = list(cache.shape), self.pool.num_gpu_blocks
            raise ValueError(f"no axis of {shape} has {blocks} blocks")
        return axis

    def _free_and_fill(self, blocks, *args, **kwargs):
        blocks = list(blocks)
        self._free(blocks, *args, **kwargs)
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self.blocks += 1
                for cache, axis in self.caches:
                    count = cache.shape[axis] // self.pool.num_gpu_blocks
                    self._fill(cache.narrow(axis, block.block_id * count, count))

    @staticmethod
    def _fill(cache):
        if cache.is_floating_point() and cache.element_size() > 1:
            cache.fill_(float("nan"))
        else:
            cache.view(torch.uint8).fill_(NAN_BYTE)


def poison_free_blocks(engine):
    """For an engine in this process that keeps no prefixes: nothing may read what it frees."""
    core = engine.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    runner = core.model_executor.driver_worker.worker.model_runner
    return Poison(pool, runner.kv_caches)
