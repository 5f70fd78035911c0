#include "pixels.h"

#include <math.h>

#include <algorithm>

#include "error.h"

namespace piflow {

Array restore(const std::vector<float>& states, const LatentSpec& spec) {
  const auto& [channels, height, width] = spec.shape;
  const int64_t packing = spec.packing, square = packing * packing, pixels = height * width;
  const int64_t count = int64_t(states.size()) / spec.size();
  Array restored{{count, channels / square, height * packing, width * packing}, {}, {}};
  restored.floats.resize(states.size());
  for (int64_t i = 0; i < int64_t(states.size()); ++i) {
    const int64_t x = i % width, y = i / width % height, c = i / pixels % channels, image = i / spec.size();
    float value = states[size_t(i)] / spec.scale + spec.shift;
    if (!spec.mean.empty()) value = value * spec.deviation[size_t(c)] + spec.mean[size_t(c)];
    // Each packing^2 channels become a square of one channel.
    const int64_t plane = image * (channels / square) + c / square;
    const int64_t row = plane * height * packing + y * packing + c / packing % packing;
    restored.floats[size_t(row * width * packing + x * packing + c % packing)] = value;
  }
  return restored;
}

Images to_pixels(const Array& values) {
  require(values.shape.size() == 4, "the decoder's images are of another shape than (count, channels, height, width)");
  Images images{values.shape[0], values.shape[2], values.shape[3], values.shape[1], {}, {}};
  images.pixels.resize(values.floats.size());
  const int64_t plane = images.height * images.width;
  for (int64_t i = 0; i < int64_t(values.floats.size()); ++i) {
    const int64_t at = i % plane, c = i / plane % images.channels, image = i / plane / images.channels;
    const float level = nearbyintf(std::min(std::max((values.floats[size_t(i)] + 1) * 127.5f, 0.0f), 255.0f));
    images.pixels[size_t((image * plane + at) * images.channels + c)] = uint8_t(level);
  }
  return images;
}

void append(Images& images, Images more) {
  if (images.count == 0) {
    images = std::move(more);
    return;
  }
  require(images.height == more.height && images.width == more.width && images.channels == more.channels,
          "the decoder made images of different sizes");
  images.count += more.count;
  images.pixels.insert(images.pixels.end(), more.pixels.begin(), more.pixels.end());
  images.latents.insert(images.latents.end(), more.latents.begin(), more.latents.end());
}

}  // namespace piflow
