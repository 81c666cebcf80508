import threading
import time

import pytest

from dino.run.writer import Writer


@pytest.fixture
def writer():
    made = Writer()
    yield made
    made.close()


def test_a_job_runs_in_a_thread_of_its_own_and_nobody_waits_for_it(writer):
    go_on, ran_in = threading.Event(), []
    writer.submit(lambda: (go_on.wait(60), ran_in.append(threading.current_thread())))
    writer.check()
    assert ran_in == []
    go_on.set()
    writer.wait()
    assert ran_in != [threading.current_thread()]


def test_a_second_job_is_taken_when_the_first_is_done(writer):
    done = []
    writer.submit(lambda: (time.sleep(0.3), done.append("first")))
    writer.submit(lambda: done.append("second"))
    assert done[0] == "first"
    writer.wait()
    assert done == ["first", "second"]


class Full(OSError):
    exit_status = 8


def fails():
    raise Full("no room")


@pytest.mark.parametrize("ask", ["wait", "check", "submit"])
def test_what_a_job_raises_is_raised_as_it_is_to_who_asks_next_and_once(writer, ask):
    error = Full("no room")

    def fail():
        raise error

    writer.submit(fail)
    if ask == "check":
        ended = time.monotonic() + 60
        with pytest.raises(Full) as raised:
            while time.monotonic() < ended:
                writer.check()
    else:
        with pytest.raises(Full) as raised:
            writer.wait() if ask == "wait" else writer.submit(lambda: None)
    assert raised.value is error
    writer.check()
    writer.wait()


def test_it_is_closed_when_the_last_job_has_ended_even_one_that_failed():
    writer, done = Writer(), []
    writer.submit(lambda: (time.sleep(0.3), done.append(1)))
    writer.close()
    assert done == [1]
    failing = Writer()
    failing.submit(fails)
    failing.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("writer")]
