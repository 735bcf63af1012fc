"""When a program that runs under `penstock run` is observed: under emulation that takes penstock seconds."""


def wait_until_observed(penstock: int) -> None:
    """Wait until a process has begun to observe, and a few looks more; not for ever. Its text is for programs too."""
    import time

    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        with open(f"/proc/{penstock}/maps") as maps:
            if "_umath_linalg" in maps.read():  # near the end of numpy, which is what penstock imports last
                break
        time.sleep(0.05)
    time.sleep(5)
