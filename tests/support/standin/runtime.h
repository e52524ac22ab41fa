// Streams, events and graphs of the stand-in: a thread takes operations from the streams' queues,
// in an order that a seed chooses, so that a missing wait shows. It lets them fill until somebody
// waits, or for a moment.
#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace standin {

struct Event {
    unsigned asked = 0;   // records put into streams
    unsigned happened = 0;  // the newest record that was reached
    double at_ms = 0;
    struct Graph* captured_by = nullptr;
};

struct Operation {
    std::function<std::string()> work;  // returns a problem or nothing
    std::shared_ptr<Event> wait_for;    // ready once this event's record `wait_count` was reached
    unsigned wait_count = 0;
};

struct Graph {
    std::vector<Operation> operations;
};

struct Stream {
    std::deque<Operation> queue;
    bool busy = false;
    Graph* captured_by = nullptr;
};

class Runtime {
public:
    static Runtime& get();

    void set_seed(unsigned long long seed);
    unsigned long long next_seed();
    Stream* open_stream();
    void close_stream(Stream* stream);  // after its work
    void put(Stream* stream, Operation operation);  // into its queue, or into the graph it captures
    std::string drain(Stream* stream);              // waits for the stream; returns a problem
    std::string drain_all();
    std::string poll(Stream* stream, bool& idle);   // the same without waiting
    void end_capture(Graph* graph);  // for all streams that joined; holds `mutex`

    void hurry();  // work goes on at once; holds `mutex`

    std::mutex mutex;  // guards streams, events and the seed

private:
    Runtime();
    void work();
    void do_next(Stream* stream, std::unique_lock<std::mutex>& lock);
    Stream* pick();

    std::condition_variable changed_;
    std::vector<std::unique_ptr<Stream>> streams_;
    std::mt19937_64 random_{1};
    std::string problem_;
    bool hurried_ = false;  // somebody waits: no more patience
};

}  // namespace standin
