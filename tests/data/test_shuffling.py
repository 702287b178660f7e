"""Sample orders: permutations, and RWKV-LM's order restated."""

import math

from rwkv7_jax.data.shuffling import (
    cubic_windows,
    is_prime,
    magic_prime,
    shuffled,
    shuffled_windows,
)


def test_is_prime_matches_trial_division():
    found = [n for n in range(200) if is_prime(n)]
    assert found == [n for n in range(2, 200) if all(n % d for d in range(2, n))]
    assert is_prime(2**31 - 1) and not is_prime((2**31 - 1) * 3)


def test_the_magic_prime_is_the_largest_valid_one():
    for windows in range(3, 300):
        expected = max(n for n in range(2, windows) if n % 3 == 2 and is_prime(n))
        assert magic_prime(windows * 16 + 15, 16) == expected
    # Said by the official tool of a published data set (minipile, 1498226207 tokens).
    assert magic_prime(1498226207, 512) == 2926181


def test_the_cubic_order_reads_every_window_below_the_prime_once():
    tokens = 100 * 8
    length = 8
    prime = magic_prime(tokens, length)
    assert prime == 89
    epoch = cubic_windows(range(prime), tokens=tokens, length=length)
    assert sorted(epoch) == [i * length for i in range(prime)]
    assert cubic_windows(range(prime, 2 * prime), tokens=tokens, length=length) == epoch


def test_the_cubic_order_matches_rwkv_lm_for_every_batch_and_device_count():
    """Restate the trainer: mini-epochs of 40320 samples, dealt to the ranks in turn."""
    tokens = 300_000 * 4
    length = 4
    world = 2
    per_device = 3
    prime = magic_prime(tokens, length)
    for batch in (0, 5, 6719, 6720, 20_000):
        epoch, place = divmod(batch * world * per_device, 40320)
        expected = set()
        for rank in range(world):
            for index in range(place // world, place // world + per_device):
                ii = 1 + epoch * 40320 + index * world + rank
                factor = int(prime * ((math.sqrt(5) - 1) / 2))
                expected.add(((factor * ii * ii * ii) % prime) * length)
        samples = range(batch * 6, batch * 6 + 6)
        assert set(cubic_windows(samples, tokens=tokens, length=length)) == expected


def test_borders_of_windows_shift_between_epochs_within_the_stream():
    # A row of two inputs and a last target starts at the first or the second of four ids.
    firsts = shuffled_windows(range(40), seed=0, tokens=4, length=2)
    assert set(firsts) == {0, 1}


def test_each_epoch_is_a_different_permutation():
    one = shuffled(range(50), seed=1, count=50)
    two = shuffled(range(50, 100), seed=1, count=50)
    assert sorted(one) == sorted(two) == list(range(50)) and one != two
