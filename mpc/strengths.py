"""Largest strengths of the strong view's operations at magnitude 1, shared by the CPU and the device views.

Ours, by what leaves a radiograph a radiograph (docs/method.md, 3.1). Each operation draws up to its value, either way.
"""

FILL = 114
"""Grey of an erased rectangle: 0.449 * 255, the mean that the network subtracts."""
REFERENCE_SIDE = 224
"""Pixels; blur widths are given at this side."""
ROTATE = 15.0
"""Degrees."""
SHEAR = 0.1
"""Tangent of the angle."""
TRANSLATE = 0.1
"""Fraction of the side."""
BRIGHTNESS = 0.3
"""Factor 1 +- this on every grey level."""
CONTRAST = 0.3
"""Factor 1 +- this on the distance from the mean grey level."""
SHARPNESS = 0.2
"""Share of a Laplacian that is added."""
BLUR_SIGMA = (0.1, 2.0)
"""Pixels at the reference side."""
