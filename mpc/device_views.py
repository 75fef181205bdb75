"""The views of `mpc.views` for a whole batch at once, in torch on the device that holds the images.

Both draw from the same laws, so either may feed a run; single images differ, because the random streams do. Nothing
here waits for the device: every operation is computed for every image, and an image that did not draw it gets its
neutral strength (factor 1, angle 0, a table that maps each grey level to itself).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mpc.config import RedConfig, StrongConfig, ViewsConfig
from mpc.strengths import BLUR_SIGMA, BRIGHTNESS, CONTRAST, FILL, REFERENCE_SIDE, ROTATE, SHARPNESS, SHEAR, TRANSLATE

OPERATIONS = (
    "autocontrast", "brightness", "contrast", "sharpen", "equalize",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""What a strong view draws from, in the order in which it is applied; the order of `mpc.views`."""
SPACING, REACH = 1.0, 4.0  # of the lattice, in units of sigma; those of mpc.red, which needs NumPy. A test compares


class DeviceViews:
    """Draws the weak views of a batch and, on top of the same draws, the strong ones.

    An object holds no state between calls: views are a function of images, configuration and generator.

    Args:
        config: strengths and probabilities.
        image_size: side of the square views, pixels.
        strong: strong views on each weak draw: 0, 1 or 2.

    Raises:
        ValueError: `strong` is another number, or a view has no two pixels.
    """

    def __init__(self, config: ViewsConfig, image_size: int, strong: int) -> None:
        if strong not in (0, 1, 2):
            raise ValueError(f"strong must be 0, 1 or 2 views, got {strong}")
        if image_size < 2:
            raise ValueError(f"image_size must be at least 2 pixels, got {image_size}")
        self.hflip, self.crop = config.hflip, config.weak.crop
        self.strong, self.red = config.strong, config.red
        self.side, self.count = image_size, strong

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Weak views, uint8 [B, 1, S, S], and strong ones, uint8 [strong * B, 1, S, S] or None.

        The strong views come view by view: rows B to 2B - 1 are second views of the same B images.

        Args:
            images: uint8 [B, 1, H, H]; never changed.
            generator: on the device of the images; all randomness is drawn from it.

        Raises:
            ValueError: the images are no square grey uint8 batch.
        """
        square = images.ndim == 4 and images.shape[1] == 1 and images.shape[2] == images.shape[3]
        if images.dtype != torch.uint8 or not square:
            raise ValueError(f"views need square uint8 images [B, 1, H, H], got {images.dtype} {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):  # half precision would lose grey levels
            weak = weak_views(images[:, 0].float(), self.side, self.crop, self.hflip, Draws(generator, images))
            strong = None
            if self.count:
                repeated = weak.repeat(self.count, 1, 1)
                strong = strong_views(repeated, self.strong, self.red, Draws(generator, repeated))
        return weak[:, None].byte(), None if strong is None else strong[:, None].byte()


class Draws:
    """Random numbers for a batch, one an image, on the batch's device.

    Args:
        generator: where they come from.
        images: of any shape [N, ...].
    """

    def __init__(self, generator: torch.Generator, images: Tensor) -> None:
        self.generator, self.count, self.device = generator, images.shape[0], images.device

    def unit(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 [N, *shape]."""
        return torch.rand((self.count, *shape), generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform in [low, high), float32 [N, 1, 1]."""
        return low + (high - low) * self.unit(1, 1)

    def happens(self, probability: float) -> Tensor:
        """True with the probability, bool [N, 1, 1]."""
        return self.unit(1, 1) < probability

    def start(self, room: Tensor) -> Tensor:
        """A whole number from 0 to `room`, both included; float32, as `room` [N, 1, 1] is."""
        return ((room + 1) * self.unit(1, 1)).floor()

    def operations(self, count: int) -> dict[str, Tensor]:
        """For each operation, which images it is applied to, bool [N, 1, 1]: `count` distinct ones an image."""
        chosen = self.unit(len(OPERATIONS)).argsort(dim=1) < count  # a random permutation, read as ranks
        return dict(zip(OPERATIONS, chosen[:, :, None, None].unbind(1), strict=True))


def weak_views(images: Tensor, side: int, crop: float, hflip: float, draws: Draws) -> Tensor:
    """Random square crops of at least `crop` of the area, resized to `side`, flipped with probability `hflip`.

    Takes float [B, H, H], gives float [B, side, side], both in whole grey levels.
    """
    full = images.shape[-1]
    kept = (draws.uniform(crop, 1.0).sqrt() * full).round()
    top, left = draws.start(full - kept), draws.start(full - kept)
    steps = torch.arange(side, device=images.device)
    along = ((steps + 0.5) * (kept / side) - 0.5).clamp(min=0.0).minimum(kept - 1)  # never beyond the crop
    across = torch.where(draws.happens(hflip), along.flip(-1), along)
    span = max(full - 1, 1) / 2
    return warp(images, (top + along.mT) / span - 1, (left + across) / span - 1)


def strong_views(images: Tensor, strong: StrongConfig, red: RedConfig, draws: Draws) -> Tensor:
    """Strong views of weak ones, float [N, S, S] in whole grey levels; what is switched off is left out."""
    side = images.shape[-1]
    if strong.ops:
        on = draws.operations(strong.ops)
        images = retouch(images, on, strong.magnitude, draws)
        images = warp(images, *affine(side, on, strong.magnitude, draws))
    if strong.blur:
        images = blur(images, strong.blur, draws)
    if red.rms and red.p:
        rms = red.rms * side * 2 / (side - 1) * draws.happens(red.p)
        dy, dx = displacement(side, rms, red.sigma * side, draws).unbind(1)
        y, x = positions(side, draws.device)
        images = warp(images, y + dy, x + dx)
    return cut_out(images, strong.cutout, draws) if strong.cutout else images


def retouch(images: Tensor, on: dict[str, Tensor], magnitude: float, draws: Draws) -> Tensor:
    """The five operations that move no pixel: autocontrast, brightness, contrast, sharpen, equalize.

    Neighbours in the order that map grey levels to grey levels are one table, [N, 1, 256], and one look-up.
    """
    levels = images.long().flatten(1)[:, None]
    counts, table = histogram(levels), torch.arange(256.0, device=images.device)
    # the autocontrast of albumentations is no linear stretch but an equalisation that does not count white pixels
    table = torch.where(on["autocontrast"], equalised(counts * (table < 255)), table)
    table = (table * _factor(BRIGHTNESS * magnitude, on["brightness"], draws)).floor().clamp(max=255.0)
    factor = _factor(CONTRAST * magnitude, on["contrast"], draws)
    mean = (counts * table).sum(dim=2, keepdim=True) / levels.shape[2]
    table = (table * factor + mean * (1 - factor)).floor().clamp(0.0, 255.0)
    share = draws.uniform(0.0, SHARPNESS * magnitude) * on["sharpen"]
    images = sharpen(table.gather(2, levels).view_as(images), share)
    levels = images.long().flatten(1)[:, None]
    table = torch.where(on["equalize"], equalised(histogram(levels)), torch.arange(256.0, device=images.device))
    return table.gather(2, levels).view_as(images)


def _factor(spread: float, on: Tensor, draws: Draws) -> Tensor:
    return torch.where(on, draws.uniform(max(0.0, 1.0 - spread), 1.0 + spread), 1.0)


def histogram(levels: Tensor) -> Tensor:
    """How many pixels have each grey level: int64 [N, 1, P] to float32 [N, 1, 256], exact up to 2**24 pixels."""
    counts = torch.zeros((levels.shape[0], 1, 256), device=levels.device)
    return counts.scatter_add_(2, levels, torch.ones(1, device=levels.device).expand(levels.shape))


def equalised(counts: Tensor) -> Tensor:
    """The table of `cv2.equalizeHist` for each histogram [N, 1, 256]; one grey level alone stays as it is."""
    below = counts.cumsum(dim=2)
    darkest = torch.where(below > 0, below, math.inf).amin(dim=2, keepdim=True)
    rest = below[..., -1:] - darkest
    table = ((below - darkest) * 255 / rest).round().clamp(0.0, 255.0)
    return torch.where(rest > 0, table, torch.arange(256.0, device=counts.device))


def sharpen(images: Tensor, share: Tensor) -> Tensor:
    """Adds `share` [N, 1, 1] of the Laplacian, nine times a pixel less the sum of the 3 x 3 around it."""
    kernels = (-share).expand(-1, 3, 3).clone()
    kernels[:, 1, 1] = 1 + 8 * share[:, 0, 0]
    return convolve(images, kernels).round().clamp(0.0, 255.0)


def blur(images: Tensor, probability: float, draws: Draws) -> Tensor:
    """Gaussian blur with the probability; sigma is uniform, the kernel ends at 3.5 sigma as in albumentations."""
    low, high = (sigma * images.shape[-1] / REFERENCE_SIDE for sigma in BLUR_SIGMA)
    sigma = draws.uniform(low, high)
    reach = (3.5 * sigma).floor() * draws.happens(probability)  # at 0 the centre alone is left
    furthest = int(3.5 * high)
    steps = torch.arange(-furthest, furthest + 1, dtype=torch.float32, device=images.device)
    kernels = (-0.5 * (steps / sigma) ** 2).exp() * (steps.abs() <= reach)
    kernels = kernels / kernels.sum(dim=2, keepdim=True)
    return convolve(convolve(images, kernels), kernels.mT).round()


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image [N, H, W] with its own kernel [N, odd, odd], mirrored at the border without repeating the edge."""
    down, across = (size // 2 for size in kernels.shape[1:])
    padded = F.pad(images, (across, across, down, down), mode="reflect")
    convolved: Tensor = F.conv2d(padded, kernels[:, None], groups=images.shape[0])
    return convolved


def affine(side: int, on: dict[str, Tensor], magnitude: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Where the five operations that move pixels read each pixel: `positions` (y, x), each float32 [N, side, side].

    `mpc.views` resamples after each of them, here the image is read once. The positions are the same, but a rotation
    with a shear stays a little sharper, and what they uncover together is mirrored once instead of twice.
    """
    limit = TRANSLATE * magnitude * side
    down, right = (draws.uniform(-limit, limit).trunc() * (2 / (side - 1)) for _ in range(2))
    limit = math.atan(SHEAR * magnitude)
    a, b = (draws.uniform(-limit, limit).tan() for _ in range(2))
    limit = math.radians(ROTATE * magnitude)
    angle = draws.uniform(-limit, limit) * on["rotate"]
    a, b, sin, cos = a * on["shear_x"], b * on["shear_y"], angle.sin(), angle.cos()
    # from the last operation to the first, since these positions lead back from the view to the image
    y, x = positions(side, draws.device)
    y, x = y + down * on["translate_y"], x + right * on["translate_x"]
    # as one matrix, so that each pixel costs no more than the sum of a column [N, side, 1] and a row [N, 1, side]
    return (
        (cos - a * sin) * y + (b * cos - (1 + a * b) * sin) * x,
        (sin + a * cos) * y + (b * sin + (1 + a * b) * cos) * x,
    )


def positions(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the pixels of a square lie, from -1 at the first to 1 at the last: (y, x), [side, 1] and [1, side]."""
    steps = torch.linspace(-1.0, 1.0, side, device=device)
    return steps[:, None], steps[None, :]


def lattice_weights(length: int, sigma_px: float, device: torch.device) -> Tensor:
    """G of `mpc.red`, float32 [length, lattice points]: Gaussian weights around each pixel, rows of unit norm."""
    step, first = SPACING * sigma_px, -REACH * sigma_px
    count = math.ceil((length - 1 + REACH * sigma_px + step - first) / step)
    points = first + step * torch.arange(count, dtype=torch.float32, device=device)
    pixels = torch.arange(length, dtype=torch.float32, device=device)
    weights = (-0.5 * ((pixels[:, None] - points) / sigma_px) ** 2).exp()
    return F.normalize(weights, dim=1)


def displacement(side: int, rms: Tensor, sigma_px: float, draws: Draws) -> Tensor:
    """Displacement fields (dy, dx) of `mpc.red`, rms * G N G^T, float32 [N, 2, side, side], in the unit of `rms`.

    Args:
        side: of the square images, pixels.
        rms: root mean square displacement per axis of each image, [N, 1, 1], in any unit.
        sigma_px: correlation length, pixels, > 0.
        draws: of N images.
    """
    weights = lattice_weights(side, sigma_px, draws.device)
    noise = draws.unit(2, weights.shape[1], weights.shape[1]) - 0.5
    noise = noise * (rms * math.sqrt(12.0))[:, None]  # U(0, 1) has variance 1/12
    return weights @ noise @ weights.mT


def warp(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear sample of float [N, H, W] at `positions` (y, x), mirrored at the border, in whole grey levels."""
    shape = images.shape[0], y.shape[-2], x.shape[-1]
    grid = torch.stack((x.expand(shape), y.expand(shape)), dim=1).permute(0, 2, 3, 1)
    read = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    return read[:, 0].round_()


def cut_out(images: Tensor, largest: float, draws: Draws) -> Tensor:
    """Fills one rectangle an image with `FILL`; each side is uniform up to `largest` of the image's."""
    side = images.shape[-1]
    height, width = (draws.uniform(0.0, largest * side).floor() for _ in range(2))
    top, left = draws.start(side - height), draws.start(side - width)
    x = torch.arange(side, device=images.device)
    y = x[:, None]
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return images.masked_fill(inside, FILL)
