"""Requests to stop."""

import os
import signal
import threading
import weakref

import jax
import pytest

from qflax.errors import Interrupted
from qflax.training.interruption import Interruption


@pytest.fixture(autouse=True)
def handlers():
    """Python's own ones: a process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), number)
        assert interruption.requested == number.name
        with pytest.raises(Interrupted, match=number.name):
            interruption.check()


def test_a_second_control_c_ends_at_once_and_further_terms_do_not():
    with Interruption() as interruption:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert interruption.requested == "SIGTERM"


def test_where_nothing_is_to_be_saved_it_stops_at_once():
    done = []
    with Interruption() as interruption:
        with pytest.raises(Interrupted), interruption.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("more")
        os.kill(os.getpid(), signal.SIGTERM)  # It was noted.
        with pytest.raises(Interrupted), interruption.at_once():  # It came before.
            done.append("even more")
    assert not done


def test_a_request_is_noted_where_nobody_reads_about_it(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody, Interruption() as interruption:
        monkeypatch.setattr("sys.stderr", nobody)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested == "SIGTERM"
        with pytest.raises(Interrupted):
            interruption.check()


def test_of_several_processes_each_passes_one_control_c_on(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    passed = []
    before = signal.signal(signal.SIGTERM, lambda number, _: passed.append(number))
    try:
        with Interruption():
            os.kill(os.getpid(), signal.SIGINT)
            assert passed == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_where_nothing_can_be_raised_the_request_stays(capfd):
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with Interruption() as interruption:
        with interruption.at_once():
            del thing
        assert interruption.requested == "SIGTERM" and reference() is None
        with pytest.raises(Interrupted):
            interruption.check()
    assert "Traceback" not in capfd.readouterr().err


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_gets_no_signals_and_needs_none():
    def run():
        with Interruption() as interruption, interruption.at_once():
            found.append(interruption.requested)

    found = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]
