#include "runtime.h"

#include <algorithm>
#include <utility>

namespace standin {

constexpr std::chrono::microseconds kPatience{200};

Runtime& Runtime::get() {
    static auto* runtime = new Runtime;  // lives as long as its thread: to the process's end
    return *runtime;
}

Runtime::Runtime() { std::thread([this] { work(); }).detach(); }

void Runtime::set_seed(unsigned long long seed) {
    std::lock_guard lock(mutex);
    random_.seed(seed);
}

unsigned long long Runtime::next_seed() {
    std::lock_guard lock(mutex);
    return random_();
}

Stream* Runtime::open_stream() {
    std::lock_guard lock(mutex);
    streams_.push_back(std::make_unique<Stream>());
    return streams_.back().get();
}

void Runtime::close_stream(Stream* stream) {
    drain(stream);
    std::lock_guard lock(mutex);
    streams_.erase(std::find_if(streams_.begin(), streams_.end(), [&](auto& s) { return s.get() == stream; }));
}

void Runtime::put(Stream* stream, Operation operation) {
    std::lock_guard lock(mutex);
    if (stream->captured_by) {
        stream->captured_by->operations.push_back(std::move(operation));
    } else {
        stream->queue.push_back(std::move(operation));
        changed_.notify_all();
    }
}

std::string Runtime::drain(Stream* stream) {
    std::unique_lock lock(mutex);
    hurry();
    changed_.wait(lock, [&] { return stream->queue.empty() && !stream->busy; });
    return std::exchange(problem_, {});
}

std::string Runtime::poll(Stream* stream, bool& idle) {
    std::lock_guard lock(mutex);
    hurry();
    idle = stream->queue.empty() && !stream->busy;
    return idle ? std::exchange(problem_, {}) : "";
}

std::string Runtime::drain_all() {
    std::unique_lock lock(mutex);
    hurry();
    changed_.wait(lock, [&] {
        return std::all_of(streams_.begin(), streams_.end(), [](auto& s) { return s->queue.empty() && !s->busy; });
    });
    return std::exchange(problem_, {});
}

void Runtime::end_capture(Graph* graph) {
    for (auto& stream : streams_)
        if (stream->captured_by == graph) stream->captured_by = nullptr;
}

void Runtime::hurry() {
    hurried_ = std::any_of(streams_.begin(), streams_.end(), [](auto& s) { return !s->queue.empty(); });
    changed_.notify_all();
}

Stream* Runtime::pick() {
    std::vector<Stream*> ready;
    for (auto& stream : streams_) {
        if (stream->queue.empty()) continue;
        const Operation& next = stream->queue.front();
        if (!next.wait_for || next.wait_for->happened >= next.wait_count) ready.push_back(stream.get());
    }
    return ready.empty() ? nullptr : ready[random_() % ready.size()];
}

void Runtime::work() {
    std::unique_lock lock(mutex);
    for (;;) {
        if (!pick()) hurried_ = false;
        changed_.wait(lock, [&] { return pick() != nullptr; });
        // The queues fill first: only then has the choice among them a meaning.
        changed_.wait_for(lock, kPatience, [&] { return hurried_; });
        hurried_ = true;
        Stream* stream = pick();
        if (stream) do_next(stream, lock);
    }
}

void Runtime::do_next(Stream* stream, std::unique_lock<std::mutex>& lock) {
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->busy = true;
    lock.unlock();
    std::string problem = operation.work ? operation.work() : "";
    operation = {};
    lock.lock();
    stream->busy = false;
    if (!problem.empty() && problem_.empty()) problem_ = problem;
    changed_.notify_all();
}

}  // namespace standin
