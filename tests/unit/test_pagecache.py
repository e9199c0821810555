"""What part of a file is in memory, as the kernel says."""

import os

import pytest

from market.cluster.pagecache import PAGE, cached_share, read_in


@pytest.fixture(params=[10, 40_000], ids=["small", "sampled"])
def path(request, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(PAGE) * request.param)
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return file


def test_dropped_file_is_read_in(path):
    before = cached_share(path)
    read_in(path)
    assert cached_share(path) == 1.0
    assert before < 1.0 or path.stat().st_dev == os.stat("/dev/shm").st_dev


def test_half_of_it(path):
    if cached_share(path):
        pytest.skip("this file system keeps what it is told to drop")
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    half = path.stat().st_size // 2
    for offset in range(0, half, PAGE):
        os.pread(descriptor, 1, offset)
    os.close(descriptor)
    assert cached_share(path) == pytest.approx(0.5, abs=0.05)


def test_empty_file_and_missing_one(tmp_path):
    (tmp_path / "empty").touch()
    assert cached_share(tmp_path / "empty") == 1.0
    with pytest.raises(FileNotFoundError):
        cached_share(tmp_path / "none")
