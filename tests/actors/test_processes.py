"""Actors in child processes without Ray: the same text, ends that leave nothing behind."""

import os
import signal
import subprocess
import sys

import pytest
from support.local_model import greedy, tokens_of

from fomoe.actors.processes import CLASSES, ProcessHandle
from fomoe.errors import BudgetError, ConfigError, EngineError
from fomoe.llm import LLM

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def running(model_paths):
    with LLM(
        model_paths["small"], devices=("cpu", "cpu"), vram_budget=1 << 24, ram_budget=0,
        ctx_size=128, threads=1, launcher="processes",
    ) as llm:  # fmt: skip
        yield llm


def test_text_is_that_of_one_process(running, local_models, prompt):
    want = tokens_of(local_models["small"].run(greedy(prompt, 8)))
    got = running.generate(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
    assert got.token_ids == want


def test_every_actor_has_a_process(running):
    handles = running.engine.running.handles
    pids = {handle.call("pid").result(5) for handle in handles.values()}
    assert len(pids | {os.getpid()}) == len(handles) + 1


def test_a_killed_child_ends_requests_and_all_start_again(running, prompt, wait_for):
    client = running.engine
    before = client.restarts
    os.kill(client.running.handles["gpu-1"].process.pid, signal.SIGKILL)
    events = list(client.stream(greedy(prompt, 4000)))
    assert events[-1].reason == "error"
    wait_for(lambda: client.restarts > before and client.status().state == "ready", 30)
    assert running.generate(prompt, max_tokens=2, temperature=0.0).token_ids


def test_exceptions_come_back_as_they_were(tmp_path):
    handle = ProcessHandle(CLASSES["storage"], "storage-0")
    try:
        with pytest.raises(AssertionError, match="joined no fabric"):
            handle.call("start", ()).result(20)
        with pytest.raises(AttributeError, match="no_such_verb"):
            handle.call("no_such_verb").result(5)
    finally:
        handle.kill()
    with pytest.raises(EngineError, match="storage-0 has ended with code -9"):
        handle.call("pid").result(1)


def test_calls_that_wait_end_with_their_process():
    handle = ProcessHandle(CLASSES["storage"], "storage-0")
    handle.call("pid").result(20)
    os.kill(handle.process.pid, signal.SIGSTOP)
    waiting = handle.call("pid")
    handle.kill()
    with pytest.raises(EngineError, match="storage-0"):
        waiting.result(1)


def test_children_end_with_their_parent(wait_for):
    code = (
        "import sys, time\n"
        "from fomoe.actors.processes import CLASSES, ProcessHandle\n"
        "handle = ProcessHandle(CLASSES['storage'], 's')\n"
        "print(handle.call('pid').result(20), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(5)
    parent.stdout.close()
    wait_for(lambda: not alive(child), 5)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"launcher": "slurm"}, ConfigError, "launcher is 'slurm'"),
        ({"devices": ("cpu@desk",)}, ConfigError, "cpu@desk.*stay on this machine"),
        ({"vram_budget": 4096}, BudgetError, "at least"),
    ],
)
def test_what_cannot_start_says_why(model_paths, change, error, message):
    options = {"ram_budget": 0, "vram_budget": 1 << 24, "launcher": "processes"} | change
    with pytest.raises(error, match=message):
        LLM(model_paths["small"], **options)


def test_an_engine_that_nobody_closed_ends_with_its_program(model_paths):
    """In the middle of an answer, with threads in native code."""
    code = (
        "from fomoe.llm import LLM\n"
        "if __name__ == '__main__':\n"
        f"    llm = LLM({str(model_paths['small'])!r}, devices='cpu,cpu', vram_budget=1 << 24,\n"
        "              ram_budget=0, ctx_size=4096, threads=1, launcher='processes')\n"
        "    stream = llm.stream([1, 2, 3], max_tokens=4000, ignore_eos=True)\n"
        "    print(next(stream))\n"
        "    raise SystemExit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 7, done.stderr


def test_neither_ray_nor_servers_are_imported():
    code = (
        "import sys\n"
        "for name in ('ray', 'fastapi', 'uvicorn', 'typer', 'gguf', 'rich', 'prometheus_client',"
        " 'pydantic', 'psutil', 'jinja2', 'hip', 'cuda'): sys.modules[name] = None\n"
        "import fomoe.llm, fomoe.actors.layers, fomoe.actors.driver, fomoe.actors.storage\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "imported\n", done.stderr
