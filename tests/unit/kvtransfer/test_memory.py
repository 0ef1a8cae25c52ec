"""Block memory: rows, mappings that a peer may open, and staging for caches that are not host memory."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import mmap
import os
import random
from collections.abc import Iterable, Iterator

import pytest
import torch
import xxhash
from helpers.kv_agents import COMPATIBILITY, LAYOUT, Prompt, hand_over, options, running

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.mapping import SharedMemory, create_mapping, host_id, open_mapping
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.rows import Rows
from baton.kvtransfer.staging import StagedBlockMemory


def make_rows(num_rows: int, row_bytes: int, seed: int) -> Rows:
    rows = Rows(bytearray(num_rows * row_bytes), num_rows, row_bytes)
    for row in range(num_rows):
        rows.row(row)[:] = random.Random((seed, row).__repr__()).randbytes(row_bytes)
    return rows


@pytest.mark.parametrize("row_bytes", [1, 13, 4096, 200_000, 600_000])
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 0), (1, 1), (2, 2), (3, 3)],
        [(0, 3), (1, 4), (2, 5), (5, 0)],
        [(3, 0), (2, 1), (1, 2)],
        [(1, 5), (1, 4)],
        [],
    ],
    ids=str,
)
def test_rows_are_copied_where_they_belong_and_the_checksum_is_of_the_copy(
    row_bytes: int, pairs: list[tuple[int, int]]
) -> None:
    source, target = make_rows(6, row_bytes, 1), make_rows(6, row_bytes, 2)
    expected = {row: bytes(target.row(row)) for row in range(6)}
    expected.update({to: bytes(source.row(of)) for of, to in pairs})
    checksums = target.copy_from(source, pairs)
    assert {row: bytes(target.row(row)) for row in range(6)} == expected
    assert checksums == [xxhash.xxh3_64_intdigest(expected[to]) for _, to in pairs]


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [3, 2, 1], [4, 5, 0, 2, 3], [1, 1], []], ids=str)
@pytest.mark.parametrize("row_bytes", [13, 4096, 600_000])
def test_rows_next_to_each_other_are_seen_as_one_piece(row_bytes: int, indices: list[int]) -> None:
    rows = make_rows(6, row_bytes, 1)
    spans = rows.spans(indices)
    assert b"".join(spans) == b"".join(rows.row(index) for index in indices)
    assert len(spans) <= len(indices)
    assert all(len(span) <= max(row_bytes, 1024 * 1024) for span in spans)
    assert row_bytes > 4096 or len(rows.spans([0, 1, 2, 3])) == 1


def test_a_source_that_changes_after_it_was_copied_does_not_change_the_checksum() -> None:
    source, target = make_rows(1, 5000, 1), make_rows(1, 5000, 2)
    copied = source.checksums((0,))[0]

    class Reused(Rows):
        def checksums(self, indices: Iterable[int]) -> list[int]:
            source.row(0)[:] = bytes(5000)
            return super().checksums(indices)

    source.__class__ = target.__class__ = Reused
    assert target.copy_from(source, [(0, 0)]) == [copied]


def test_a_row_of_shared_memory_cannot_be_written_by_the_peer() -> None:
    memory = HostBlockMemory(2, 64)
    assert memory.shared is not None
    rows = Rows(open_mapping(memory.shared), 2, 64)
    memory.rows.row(1)[:] = b"x" * 64
    assert bytes(rows.row(1)) == b"x" * 64
    with pytest.raises(TypeError):
        rows.row(1)[0] = 1
    memory.close()


def test_the_tensor_and_the_rows_are_the_same_memory() -> None:
    memory = HostBlockMemory(4, 8)
    memory.tensor.view(4, 8)[2] = 7
    assert bytes(memory.rows.row(2)) == b"\7" * 8
    assert memory.tensor.shape == (32,)
    memory.close()


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    mapping, fd, shared = create_mapping(4096)
    assert shared is not None
    assert fd is not None
    yield shared
    os.close(fd)
    mapping.close()


def refused(shared: SharedMemory) -> str:
    with pytest.raises(TransferError) as caught:
        open_mapping(shared)
    assert caught.value.code is TransferCode.INCOMPATIBLE
    return caught.value.message


def test_a_mapping_is_opened_only_with_its_nonce_and_size(shared: SharedMemory) -> None:
    open_mapping(shared).close()
    assert "another process's" in refused(dataclasses.replace(shared, nonce=bytes(16)))
    assert "4128 bytes, 8224 were announced" in refused(dataclasses.replace(shared, num_bytes=8192))


def test_nothing_else_than_a_block_pool_is_opened(shared: SharedMemory, tmp_path: object) -> None:
    read_end, write_end = os.pipe()
    with open(f"{tmp_path}/secret", "wb") as file:
        file.write(bytes(5000))
        for fd in (read_end, file.fileno()):
            assert "is not a block pool" in refused(dataclasses.replace(shared, fd=fd))
    os.close(read_end)
    os.close(write_end)
    assert "cannot be opened" in refused(dataclasses.replace(shared, fd=999_999))
    assert "cannot be opened" in refused(dataclasses.replace(shared, pid=2**31 - 1))


def test_a_mapping_that_its_owner_could_shrink_is_refused() -> None:
    fd = os.memfd_create("baton-kv", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096 + 32)
    assert "not sealed" in refused(SharedMemory(os.getpid(), fd, 4096, bytes(16)))
    os.close(fd)


def test_our_own_mapping_can_neither_shrink_nor_grow(shared: SharedMemory) -> None:
    seals = fcntl.fcntl(shared.fd, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, size)


def test_a_mapping_has_no_name_and_goes_with_its_last_user(shared: SharedMemory) -> None:
    assert os.readlink(f"/proc/self/fd/{shared.fd}") == "/memfd:baton-kv (deleted)"
    assert not [name for name in os.listdir("/dev/shm") if "baton" in name]


def test_without_linux_memory_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.kvtransfer.mapping.sys.platform", "darwin")
    mapping, fd, shared = create_mapping(4096)
    assert isinstance(mapping, mmap.mmap)
    assert fd is shared is None
    mapping.close()


def test_the_host_has_an_id() -> None:
    assert len(host_id()) == 36


# Staging.

SHAPE = (10, *LAYOUT.block_shape)


def staged(num_rows: int = 8, seed: int = 0) -> tuple[StagedBlockMemory, torch.Tensor]:
    cache = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))
    return StagedBlockMemory(cache, num_rows), cache


async def test_staged_blocks_go_out_and_come_in() -> None:
    memory, cache = staged()
    assert (memory.num_blocks, memory.block_bytes, memory.max_rows) == (10, LAYOUT.block_bytes, 4)
    rows = await memory.load([7, 2])
    for row, block_id in zip(rows, (7, 2), strict=True):
        assert bytes(memory.rows.row(row)) == cache[block_id].numpy().tobytes()
    claimed = await memory.claim([4, 5])
    for row, of in zip(claimed, rows, strict=True):
        memory.rows.row(row)[:] = memory.rows.row(of)
    await asyncio.to_thread(memory.store, claimed, [4, 5])
    assert torch.equal(cache[4], cache[7])
    assert torch.equal(cache[5], cache[2])
    memory.close()


async def test_staged_blocks_keep_their_places_where_rows_are_scattered() -> None:
    memory, cache = staged(num_rows=16)
    first = await memory.load([0, 1, 2, 3, 4, 5, 6, 7])
    memory.unload([first[1], first[2], first[6], first[4]])
    block_ids = [9, 3, 8, 1]
    rows = await memory.load(block_ids)
    assert rows == [1, 2, 4, 6]
    claimed = await memory.claim(list(range(8)))
    memory.unclaim([claimed[5], claimed[0], claimed[1], claimed[7]])
    claimed = await memory.claim([4, 5, 6, 7])
    for row, of, block_id in zip(claimed, rows, block_ids, strict=True):
        assert bytes(memory.rows.row(of)) == cache[block_id].numpy().tobytes()
        memory.rows.row(row)[:] = memory.rows.row(of)
    await asyncio.to_thread(memory.store, claimed, [4, 5, 6, 7])
    assert torch.equal(cache[4:8], cache[block_ids])
    await asyncio.to_thread(memory.store, [], [])
    memory.close()


async def test_who_asks_for_rows_waits_its_turn_and_neither_direction_starves_the_other() -> None:
    memory, _ = staged(num_rows=4)
    out = await memory.load([1, 2])
    waiting = asyncio.create_task(memory.load([3]))
    second = asyncio.create_task(memory.load([4]))
    assert memory.try_claim([5, 6]) is not None
    assert memory.try_claim([7]) is None
    await asyncio.sleep(0)
    assert not waiting.done()
    memory.unload(out[:1])
    await waiting
    assert not second.done()
    second.cancel()
    await asyncio.wait([second])
    memory.unload(out[1:] + waiting.result())
    assert sorted(await memory.load([8, 9])) == [0, 1]
    with pytest.raises(ValueError, match="3 rows"):
        await memory.load([1, 2, 3])
    memory.close()


@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_a_handoff_through_a_staging_area_smaller_than_the_prompt(transport: str) -> None:
    there, source = staged(num_rows=4, seed=1)
    here, target = staged(num_rows=6, seed=2)
    before = target.clone()
    common = {"transports": transport, "compatibility": COMPATIBILITY, "options": options(stall_s=5.0)}
    async with (
        running("prefill-0", memory=there, **common) as sender,
        running("decode-0", memory=here, **common) as node,
    ):
        prompts = [Prompt([9, 0, 3, 4, 8], request_id="one"), Prompt([1, 2, 5], request_id="two")]
        await asyncio.gather(*(hand_over(sender, node, prompt) for prompt in prompts))
        written = set()
        for prompt in prompts:
            for slot in node.host.slots[prompt.key]:
                assert torch.equal(target[slot.block_id], source[prompt.block_ids[slot.index]])
                written.add(slot.block_id)
        for block_id in set(range(10)) - written:
            assert torch.equal(target[block_id], before[block_id])
        # Every row is free again.
        assert len(await there.load([0, 1])) == len(await here.claim([0, 1, 2])) - 1 == 2


def test_a_staging_area_needs_a_row_for_each_direction() -> None:
    with pytest.raises(ValueError, match="1 rows"):
        staged(num_rows=1)
