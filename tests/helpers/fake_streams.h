// Streams of the pretended driver: queues of work, done as late as CUDA allows.
//
// What is queued is not done before somebody must see it: when the host waits for a stream, the work of that stream is
// done, and of others only what an event makes it wait for. So a stream that reads what another writes, without waiting
// for it, reads too early; and host memory that is given back or written over before the copy from it has been waited
// for is read too late. `fake_set_order` takes other orders: 1 does the work of all other streams first, so that a stream
// that writes over what another still has to read, without waiting for it, writes too early; 2 does one piece of work of
// every stream in turn, so that streams that share memory without waiting meet in the midst of it.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace streams {

using Work = std::function<void()>;
struct Queue;

// A place in a queue, at which an event was recorded.
struct Mark {
  std::shared_ptr<Queue> queue;
  bool is_reached = false;
};

struct Task {
  Work work;
  std::shared_ptr<Mark> waits_for;  // or null
};

struct Queue {
  std::deque<Task> tasks;
  bool is_captured = false, is_invalid = false;
  std::thread::id capturing_thread;
  std::vector<Work> captured;
};

// Held by every call of the driver. Work may call Python, which may give memory back: hence recursive.
static std::recursive_mutex lock;
static std::map<void*, std::shared_ptr<Queue>> queues;  // by their handles
static std::vector<std::shared_ptr<Queue>> destroyed;   // whose work is still done
enum Order { kLate, kOthersFirst, kInTurn };
static Order order = kLate;

static Queue& queue_of(void* stream) {
  auto& queue = queues[stream];  // 0 and those of other libraries were never created here
  if (!queue) queue = std::make_shared<Queue>();
  return *queue;
}

static void run(Queue& queue, const Mark* until);

static void run_one(Queue& queue) {
  const std::shared_ptr<Mark> mark = queue.tasks.front().waits_for;
  if (mark && !mark->is_reached) run(*mark->queue, mark.get());
  const Task task = std::move(queue.tasks.front());
  queue.tasks.pop_front();
  task.work();
}

static void run(Queue& queue, const Mark* until) {
  while (!queue.tasks.empty() && !(until && until->is_reached)) run_one(queue);
}

static bool are_idle() {
  for (const auto& [_, queue] : queues) {
    if (!queue->tasks.empty()) return false;
  }
  for (const auto& queue : destroyed) {
    if (!queue->tasks.empty()) return false;
  }
  return true;
}

static void synchronize(void* stream) {
  Queue& queue = queue_of(stream);
  const auto all = queues;  // a copy: work may create streams
  for (const auto& [_, other] : all) {
    if (order == kOthersFirst && other.get() != &queue) run(*other, nullptr);
  }
  while (order == kInTurn && !queue.tasks.empty()) {
    for (const auto& [_, other] : all) {
      if (!other->tasks.empty()) run_one(*other);
    }
  }
  run(queue, nullptr);
}

static void push(void* stream, Work work, std::shared_ptr<Mark> waits_for = nullptr) {
  Queue& queue = queue_of(stream);
  if (queue.is_captured) {
    queue.captured.push_back(work);
  } else {
    queue.tasks.push_back({work, waits_for});
  }
}

static std::shared_ptr<Mark> record(void* stream) {
  queue_of(stream);
  auto mark = std::make_shared<Mark>(Mark{queues[stream]});
  push(stream, [mark] { mark->is_reached = true; });
  return mark;
}

// Whether the calling thread records: it may then do nothing that could wait for the GPU. The recording is spoilt.
static bool spoils_a_recording() {
  bool spoils = false;
  for (const auto& [_, queue] : queues) {
    if (queue->is_captured && queue->capturing_thread == std::this_thread::get_id()) {
      spoils = queue->is_invalid = true;
    }
  }
  return spoils;
}

}  // namespace streams
