// The C boundary: exceptions end here and become sentences.
#include "../piflow.h"

#include <algorithm>
#include <new>
#include <string>

#include "error.h"
#include "generator.h"

struct piflow_generator {
  piflow::Generator made;
};

namespace {

thread_local std::string last_error;

template <class Work>
piflow_outcome guard(Work work) {
  try {
    last_error.clear();
    work();
    return PIFLOW_DONE;
  } catch (const piflow::Cancelled& error) {
    last_error = error.what();
    return PIFLOW_CANCELLED;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return PIFLOW_FAILED;
}

template <class Value>
Value* copy(const std::vector<Value>& values) {
  auto* copied = new Value[values.size()];
  std::copy(values.begin(), values.end(), copied);
  return copied;
}

void fill(piflow_images& images, const piflow::Images& made) {
  images.pixels = copy(made.pixels);
  images.latents = copy(made.latents);
  images.count = made.count;
  images.height = made.height;
  images.width = made.width;
  images.channels = made.channels;
  images.latent_size = int64_t(made.latents.size()) / made.count;
}

// Fills `images`, or leaves them empty.
template <class Make>
piflow_outcome make_images(piflow_images* images, Make make) {
  if (images) *images = {};
  const piflow_outcome outcome = guard([&] {
    piflow::require(images, "give a piflow_images to fill; got a null pointer");
    fill(*images, make());
  });
  if (outcome != PIFLOW_DONE && images) piflow_free_images(images);
  return outcome;
}

}  // namespace

piflow_generator* piflow_load(const char* folder, const piflow_load_options* options) {
  piflow_generator* generator = nullptr;
  guard([&] {
    piflow::require(folder, "give the folder of a bundle; got a null pointer");
    generator = new piflow_generator{piflow::Generator(folder, options ? *options : piflow_load_options{})};
  });
  return generator;
}

void piflow_close(piflow_generator* generator) { delete generator; }

piflow_outcome piflow_generate(piflow_generator* generator, const piflow_request* request, piflow_images* images) {
  return make_images(images, [&] {
    piflow::require(generator && request, "give a generator and a request; got a null pointer");
    return generator->made.make(*request);
  });
}

piflow_outcome piflow_preview(const piflow_progress* progress, piflow_images* images) {
  return make_images(images, [&] {
    piflow::require(progress, "give the progress that the callback got; got a null pointer");
    return static_cast<const piflow::Trajectory*>(progress->trajectory)->preview();
  });
}

void piflow_free_images(piflow_images* images) {
  if (!images) return;
  delete[] images->pixels;
  delete[] images->latents;
  *images = {};
}

void piflow_cancel(piflow_generator* generator) {
  guard([&] {
    if (generator) generator->made.cancel();
  });
}

const char* piflow_last_error(void) { return last_error.c_str(); }
