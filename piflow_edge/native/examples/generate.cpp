// One image for each label: piflow_generate BUNDLE SEED OUT.ppm LABEL...; without labels one image that nothing steers.
// OUT gets a row of images (binary PPM, or PGM where they are grey). Ctrl-C cancels.
#include <piflow.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace {

volatile std::sig_atomic_t is_interrupted = 0;

int32_t show_progress(void*, const piflow_progress* progress) {
  piflow_images preview{};
  if (piflow_preview(progress, &preview) != PIFLOW_DONE) return 1;
  std::fprintf(stderr, "call %d of %d, noise level %.3f: images %lld to %lld, %lld x %lld pixels\n", int(progress->call),
               int(progress->nfe), progress->sigma_t, (long long)progress->first,
               (long long)(progress->first + progress->count - 1), (long long)preview.width, (long long)preview.height);
  piflow_free_images(&preview);  // a window would show preview.pixels first
  return is_interrupted;
}

bool write_row(const char* path, const piflow_images& images) {
  std::FILE* file = std::fopen(path, "wb");
  if (!file) return false;
  const int64_t row = images.width * images.channels;
  std::fprintf(file, "P%d\n%lld %lld\n255\n", images.channels == 1 ? 5 : 6, (long long)(images.count * images.width),
               (long long)images.height);
  for (int64_t y = 0; y < images.height; ++y) {
    for (int64_t i = 0; i < images.count; ++i) {
      std::fwrite(images.pixels + (i * images.height + y) * row, 1, size_t(row), file);
    }
  }
  return std::fclose(file) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s BUNDLE SEED OUT.ppm [LABEL...]\n", argv[0]);
    return 2;
  }
  std::signal(SIGINT, [](int) { is_interrupted = 1; });
  const std::unique_ptr<piflow_generator, decltype(&piflow_close)> generator(piflow_load(argv[1], nullptr), piflow_close);
  if (!generator) {
    std::fprintf(stderr, "%s\n", piflow_last_error());
    return 1;
  }
  std::vector<int64_t> labels;
  for (int i = 4; i < argc; ++i) labels.push_back(std::atoll(argv[i]));
  piflow_request request{};
  request.count = labels.empty() ? 1 : int64_t(labels.size());
  request.seed = std::strtoull(argv[2], nullptr, 10);
  request.labels = labels.empty() ? nullptr : labels.data();
  request.callback = show_progress;
  piflow_images images{};
  const piflow_outcome outcome = piflow_generate(generator.get(), &request, &images);
  const bool is_written = outcome == PIFLOW_DONE && write_row(argv[3], images);
  if (outcome != PIFLOW_DONE) std::fprintf(stderr, "%s\n", piflow_last_error());
  else if (!is_written) std::fprintf(stderr, "%s cannot be written\n", argv[3]);
  piflow_free_images(&images);
  return is_written ? 0 : outcome == PIFLOW_CANCELLED ? 130 : 1;
}
