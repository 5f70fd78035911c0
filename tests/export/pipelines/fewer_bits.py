"""Bundles in fewer bits beside the same in fp32: what they make of prompts, and how far apart that may be."""

import numpy as np

from piflow_edge.bundle.precisions import join_tolerances
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.runtime.verification import relative_error, rms_levels, rms_of_psnr


def assert_draws_nearly_the_same(generator, exact, prompts, student, encoder):
    """Compare encodings, latents and images. `student`, `encoder`: precisions; a decoder is in the student's."""
    tolerances = join_tolerances(student, student, [encoder])
    theirs = exact.conditioner.encode(ConditionRequest(prompts=prompts))
    for name, found in generator.conditioner.encode(ConditionRequest(prompts=prompts)).items():
        if found.dtype.kind == "f":
            # Of the fp32 one too little would be off: the network was not converted.
            assert 1e-5 < relative_error(found, theirs[name]) <= tolerances.encodings, name
    noise = np.random.default_rng(0).standard_normal((len(prompts), 4, 8, 12), np.float32)
    ours, wanted = (one(prompts, noise=noise, output="numpy") for one in (generator, exact))
    assert 1e-5 < relative_error(ours.latents, wanted.latents) <= tolerances.latents
    assert rms_levels(ours.images, wanted.images) <= rms_of_psnr(tolerances.psnr)
