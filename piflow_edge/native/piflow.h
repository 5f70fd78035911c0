/* Images of a bundle from C, over ONNX Runtime: the same noise as in Python to the bit, the same pictures.
 *
 * piflow_load opens a bundle, piflow_generate makes images, piflow_close frees it. What fails returns null or a status
 * other than PIFLOW_DONE, and piflow_last_error() says why, in words. A struct that is all zero asks for what is usual.
 * Several threads may make images with one generator at the same time. examples/generate.cpp is a whole program.
 */
#ifndef PIFLOW_H
#define PIFLOW_H

#include <stdint.h>

#include "piflow_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum piflow_outcome { PIFLOW_DONE = 0, PIFLOW_FAILED = 1, PIFLOW_CANCELLED = 2 } piflow_outcome;
typedef enum piflow_dtype { PIFLOW_FLOAT32 = 0, PIFLOW_INT64 = 1 } piflow_dtype;

typedef struct piflow_generator piflow_generator;

typedef struct piflow_load_options {
  const char* precision; /* one of the bundle's; null: its first */
  const char* sha256;    /* in hexadecimal, that bundle.json must have: then only its maker can change a bundle */
  int32_t num_threads;   /* of a network and of the policy, at most; 0: one for each core */
} piflow_load_options;

/* Opens the bundle in a folder, once every file matched its checksum. Null if it cannot. `options` may be null. */
PIFLOW_API piflow_generator* piflow_load(const char* folder, const piflow_load_options* options);

/* Frees a generator that no other thread uses any more. Null is allowed. */
PIFLOW_API void piflow_close(piflow_generator* generator);

/* Made by piflow_generate and piflow_preview; free with piflow_free_images. */
typedef struct piflow_images {
  int64_t count, height, width, channels;
  uint8_t* pixels;     /* (count, height, width, channels) */
  int64_t latent_size; /* numbers in one image's latents */
  float* latents;      /* (count, latent_size), as the network sees them */
} piflow_images;

PIFLOW_API void piflow_free_images(piflow_images* images);

/* Token ids of one prompt for one encoder: those of the prompt in the encoder's template, without padding. */
typedef struct piflow_tokens {
  const int64_t* ids;
  int64_t count;
} piflow_tokens;

/* An input of the student that was made elsewhere, such as the encoding of prompts. C-contiguous. */
typedef struct piflow_array {
  const char* name;
  piflow_dtype dtype;
  int32_t rank;
  const int64_t* shape; /* (rank,); the first is the request's count */
  const void* data;
} piflow_array;

/* How far one batch of images is. Valid during the callback only. */
typedef struct piflow_progress {
  int64_t first, count;   /* which images of the request these are */
  int32_t call, nfe;      /* network calls made, of how many */
  double sigma_t;         /* the noise level now */
  const void* trajectory; /* for piflow_preview */
} piflow_progress;

/* Called after every network call and its rollout, in the thread that generates. Another value than 0 cancels. */
typedef int32_t (*piflow_callback)(void* context, const piflow_progress* progress);

/* Exactly one of `labels`, `tokens` and `arrays` steers, as the bundle needs it; none where nothing steers. */
typedef struct piflow_request {
  int64_t count;               /* images, 1 or more; image i is number i of the seed */
  uint64_t seed;               /* of the noise */
  const int64_t* labels;       /* (count,): class ids */
  const piflow_tokens* tokens; /* (count, encoders), in the order in which the bundle names its encoders */
  const piflow_array* arrays;  /* (num_arrays,) */
  int32_t num_arrays;
  int32_t nfe;      /* network calls; 0: the bundle's */
  int32_t substeps; /* Euler steps on the policies in all; 0: the bundle's */
  piflow_callback callback; /* may be null */
  void* context;            /* for the callback */
} piflow_request;

/* Makes images. `images` is filled if PIFLOW_DONE is returned, and empty else. */
PIFLOW_API piflow_outcome piflow_generate(piflow_generator* generator, const piflow_request* request,
                                          piflow_images* images);

/* Within a callback: the images as the policy sees them now. Costs no call of the network but the decoder's. */
PIFLOW_API piflow_outcome piflow_preview(const piflow_progress* progress, piflow_images* images);

/* From any thread: ends all calls that are running on a generator with PIFLOW_CANCELLED, within a network call too. */
PIFLOW_API void piflow_cancel(piflow_generator* generator);

/* Why the last call in this thread failed. Valid until the next one. */
PIFLOW_API const char* piflow_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
