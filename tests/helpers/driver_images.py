"""What takes the place of compiled kernels for the pretended driver, where NVRTC itself looks for a real one."""

NAMES = ("K", "C", "STORAGE", "LANES")


def compile_for_fake_driver(arch, defines, source):
    """What `nvidia.compile_source` is replaced by: an image as fake_driver.cpp reads it."""
    if source.name == "arrays.cu":
        return b"arrays"
    values = dict(define.removeprefix("PIFLOW_").split("=") for define in defines)
    return " ".join(values[name] for name in NAMES).encode()
