"""A ledger file with flipped bytes: no crash, and no account gets more memory than there is."""

from __future__ import annotations

import random

from devkit.report import record
from kvcached_core.errors import KVCachedError
from kvcached_core.ledger import Runtime, check, set_limit, snapshot
from kvcached_core.ledger.file import layout
from kvcached_core.ledger.snapshot import parse
from tests.ledger.helpers import CAPACITY, GRANULE, PLENTY, attach, die, hold

FLIPS = 1_000_000


FLIPS_AT_ONCE = 16  # at most, in one file


HELD = ("leased_bytes", "ready_bytes", "mapped_bytes", "used_bytes", "cached_bytes", "stranded_bytes")


def busy_file(runtime: Runtime) -> bytes:
    for n in range(5):
        account = attach(runtime, f"i{n}", name=f"n{n}")
        hold(account, n + 1)
        account.publish(n * GRANULE, 3)
    return runtime.device("host").ledger.read_bytes()


def test_i1_no_flipped_bytes_crash_the_parser_or_show_more_than_the_capacity(runtime: Runtime) -> None:
    clean = busy_file(runtime)
    chance = random.Random(20_25)
    flips = parses = shown_damage = 0
    used = layout.HEADER_BYTES + 6 * layout.SLOT_BYTES
    while flips < FLIPS:
        data = bytearray(clean)
        for _ in range(1 + parses % FLIPS_AT_ONCE):
            # three flips in four hit the header and the used slots
            at = chance.randrange(used) if chance.random() < 0.75 else chance.randrange(len(data))
            data[at] ^= 1 << chance.randrange(8) if parses % 2 else chance.randrange(1, 256)
            flips += 1
        if parses % 50 == 0:
            del data[chance.randrange(len(data)) :]
        parses += 1
        seen = parse(bytes(data), lambda slot: slot % 2 == 0)
        for owner in seen.owners:
            assert all(0 <= getattr(owner, name) <= seen.capacity_bytes for name in HELD)
        shown_damage += bool(check(seen))
    assert shown_damage > parses // 20
    record("ledger.byte_flips", flips)
    record("ledger.damaged_parses", parses)


def test_noise_is_no_ledger(runtime: Runtime) -> None:
    chance = random.Random(7)
    for size in (0, 1, 511, 512, 4096, 66_048):
        seen = parse(chance.randbytes(size), lambda slot: True)
        assert seen.damage and seen.owners == ()


def test_i1_an_account_on_a_file_with_flipped_bytes_never_gets_more_than_the_capacity(
    runtime: Runtime,
) -> None:
    chance = random.Random(11)
    refused = granted = 0
    for turn in range(300):
        a, b = attach(runtime, f"a{turn}"), attach(runtime, f"b{turn}", name="b")
        hold(a, 30)
        path = runtime.device("host").ledger
        with path.open("r+b") as file:
            for _ in range(4):
                at = chance.randrange(layout.HEADER_BYTES + 3 * layout.SLOT_BYTES)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ (1 << chance.randrange(8))]))
        try:
            got = b.lease(CAPACITY, PLENTY)
            assert 0 <= got <= CAPACITY
            granted += got > 0
            set_limit(runtime, "b", 3 * GRANULE)
            b.acknowledge()
        except KVCachedError:
            refused += 1
        snapshot(runtime)
        for account in (a, b):
            die(account)
        path.unlink()
    assert granted > 100 and refused > 0
