"""What a reader of the figures must know: too few images for the features, and figures that disagree."""

from collections.abc import Sequence

from .scores import Score

# Images per feature below which a Frechet distance is mostly the bias of its covariance.
_LEAST_PER_FEATURE = 10


def find_warnings(scores: Sequence[Score], students: Sequence[str], images: int, width: int) -> list[str]:
    """Return a sentence for each reason to distrust a figure.

    Args:
        scores: of all contenders.
        students: names of those that are students.
        images: fewest images that a distance was measured on.
        width: features per image.
    """
    found = []
    if images < _LEAST_PER_FEATURE * width:
        found.append(
            f"{images} images are few for {width} features: FID is then mostly the bias of a small sample. Trust KID "
            f"and MSE, or give --images and real images of {_LEAST_PER_FEATURE * width} or more"
        )
    judged = [(s.mse, s) for s in scores if s.name in students and s.mse is not None]
    if len(judged) > 1:
        by_fid = min((score for _, score in judged), key=lambda s: s.fid)
        _, by_mse = min(judged, key=lambda pair: pair[0])
        if by_fid is not by_mse:
            found.append(
                f"FID prefers {by_fid.name!r} ({by_fid.fid:.4g}; MSE {by_fid.mse:.4g}), MSE to the teacher prefers "
                f"{by_mse.name!r} ({by_mse.fid:.4g}; MSE {by_mse.mse:.4g}). A student is taught to make the teacher's "
                "images, which is what MSE asks; look at the pictures"
            )
    return found
