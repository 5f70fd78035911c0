// Latents -> the pixels of images, as piflow_edge/runtime/images.py makes them.
#pragma once

#include "generator.h"

namespace piflow {

// What the decoder takes, or the pixels from -1 to 1, of states.
Array restore(const std::vector<float>& states, const LatentSpec& spec);

// Values from -1 to 1, (B, C, H, W), as images.
Images to_pixels(const Array& values);

// Adds images of the same size; to none, of any.
void append(Images& images, Images more);

}  // namespace piflow
