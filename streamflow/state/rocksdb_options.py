"""How RocksDB is set up: for point reads, batched writes and short range scans, within one memory budget per process.

Every figure here was chosen for a machine that runs agents on the same cores: memory that is capped before speed, few
background threads, no write that waits.
"""

from __future__ import annotations

from rocksdict import (
    BlockBasedOptions,
    Cache,
    DataBlockIndexType,
    DBCompressionType,
    Options,
    WriteBufferManager,
    WriteOptions,
)

CACHE_SHARE = 0.5
"""Part of `memory_budget_bytes` that is RocksDB's: cached blocks, indexes, filters and write buffers together. The rest
is for what lies above (decoded values, uncommitted changes, outputs) and for what no cache counts: the allocator's
slack, open files, a compaction's buffers."""

BUFFER_SHARE = 0.4
"""Part of RocksDB's share that write buffers may take; they are charged to the cache, so that the sum is capped."""

MAX_OPEN_FILES = 128
"""Data files that one store keeps open; more are opened when they are read."""

_MIB = 1024 * 1024


class Memory:
    """The cache and the write-buffer manager that all stores of a process share.

    Args:
        budget_bytes: The process's `memory_budget_bytes`.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.cache_bytes = max(int(budget_bytes * CACHE_SHARE), 4 * _MIB)
        self.buffer_bytes = max(int(self.cache_bytes * BUFFER_SHARE), 2 * _MIB)
        self.cache = Cache(self.cache_bytes)
        # It never stalls a write: a stall would hold the interpreter's lock. `RocksStore.write` waits outside of it.
        self.buffers = WriteBufferManager.new_write_buffer_manager_with_cache(self.buffer_bytes, False, self.cache)

    @property
    def is_tight(self) -> bool:
        """Whether write buffers fill most of their share."""
        return self.buffers.get_usage() > 0.7 * self.buffer_bytes

    @property
    def is_full(self) -> bool:
        """Whether write buffers have all of their share."""
        return self.buffers.get_usage() > self.buffer_bytes

    def small_options(self) -> Options:
        """Options of the store itself, and of a column family that holds next to nothing."""
        options = self.options()
        options.set_write_buffer_size(_MIB)
        options.set_memtable_whole_key_filtering(False)
        options.set_memtable_prefix_bloom_ratio(0.0)
        return options

    def options(self) -> Options:
        """Options of a table."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        self._set_memory(options)
        _set_files(options)
        _set_quiet(options)
        options.set_block_based_table_factory(self._blocks())
        return options

    def _set_memory(self, options: Options) -> None:
        options.set_write_buffer_manager(self.buffers)
        options.set_write_buffer_size(min(8 * _MIB, self.buffer_bytes // 2))
        options.set_max_write_buffer_number(4)  # one fills while others are flushed, so that no write has to wait
        options.set_arena_block_size(64 * 1024)  # the default of 1 MiB per table would be the whole budget of 64 tables
        options.set_memtable_whole_key_filtering(True)  # a key that is not in the write buffer is seen at once
        options.set_memtable_prefix_bloom_ratio(0.01)  # 80 KiB a table, taken when it is opened

    def _blocks(self) -> BlockBasedOptions:
        blocks = BlockBasedOptions()
        blocks.set_block_cache(self.cache)
        blocks.set_cache_index_and_filter_blocks(True)  # or they would grow with the data, outside the budget
        blocks.set_pin_l0_filter_and_index_blocks_in_cache(True)  # the newest files are asked for every key
        blocks.set_bloom_filter(10, False)  # 1 % of the reads of missing keys touch a data block, for 10 bits a key
        blocks.set_block_size(8 * 1024)  # small values: a miss reads and decompresses little
        blocks.set_data_block_index_type(DataBlockIndexType.binary_and_hash())  # finds a key in a cached block faster
        blocks.set_data_block_hash_ratio(0.75)
        blocks.set_format_version(5)
        # Filters and indexes in one block per file: in partitions they fit a smaller cache, but a read of a cached
        # block took 4.1 us instead of 1.7 (6 M keys, measured).
        return blocks


def _set_files(options: Options) -> None:
    """Number and size of files: level compaction keeps the count flat and the space within about 1.1 of the data."""
    options.set_compression_type(DBCompressionType.lz4())  # cheapest to read and write; halves JSON
    options.set_level_compaction_dynamic_level_bytes(True)
    options.set_level_zero_file_num_compaction_trigger(4)
    options.set_level_zero_slowdown_writes_trigger(24)
    options.set_level_zero_stop_writes_trigger(48)  # far off: restores write faster than one thread compacts
    options.set_target_file_size_base(32 * _MIB)
    options.set_max_bytes_for_level_base(64 * _MIB)
    options.set_max_open_files(MAX_OPEN_FILES)
    options.set_max_total_wal_size(64 * _MIB)  # the most that an open after a crash has to replay
    options.set_manifest_preallocation_size(64 * 1024)
    options.set_max_manifest_file_size(4 * _MIB)
    options.set_bytes_per_sync(_MIB)  # the kernel writes steadily instead of in bursts


def _set_quiet(options: Options) -> None:
    """Threads and RocksDB's own log."""
    options.set_max_background_jobs(2)  # one flush and one compaction at a time, in pools that all stores share
    options.set_max_file_opening_threads(1)
    options.set_skip_stats_update_on_db_open(True)  # opening does not read every file for statistics
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(_MIB)


def write_options() -> WriteOptions:
    """Of every write: the write-ahead log is on and not synced (a killed process loses nothing), nothing stalls.

    A write that would have to wait for flushes is refused at once and tried again: waiting inside the native library
    would hold the interpreter's lock and stop the event loop.
    """
    options = WriteOptions()
    options.sync = False
    options.no_slowdown = True
    return options
