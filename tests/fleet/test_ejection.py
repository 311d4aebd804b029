from balancer.fleet.ejection import CONSECUTIVE, LATELY_SECONDS, WINDOW, WINDOW_FAILURES, Outlier


def test_five_failures_in_a_row_are_enough_and_four_are_not() -> None:
    outlier = Outlier(10, 300)
    verdicts = [outlier.failed() for _ in range(CONSECUTIVE)]
    assert verdicts == [False, False, False, False, True]


def test_a_success_begins_the_row_again() -> None:
    outlier = Outlier(10, 300)
    for _ in range(CONSECUTIVE - 1):
        outlier.failed()
    outlier.answered(0.0, is_well=True)
    assert not outlier.failed()


def test_half_of_the_last_twenty_are_enough() -> None:
    outlier = Outlier(10, 300)
    verdicts = []
    for _ in range(WINDOW // 2):
        outlier.answered(0.0, is_well=True)
        verdicts.append(outlier.failed())
    assert verdicts == [False] * (WINDOW_FAILURES - 1) + [True]


def test_old_outcomes_leave_the_window() -> None:
    outlier = Outlier(10, 300)
    for _ in range(3):
        outlier.failed()
    for _ in range(WINDOW):
        outlier.answered(0.0, is_well=True)
    for _ in range(WINDOW_FAILURES - 1):
        outlier.answered(0.0, is_well=True)
        assert not outlier.failed()


def test_each_ejection_is_longer_up_to_the_longest() -> None:
    outlier = Outlier(10, 45)
    now, spans = 0.0, []
    for _ in range(6):
        until = outlier.eject(now)
        spans.append(until - now)
        now = until
    assert spans == [10, 20, 30, 40, 45, 45]


def test_ejection_times_start_again() -> None:
    """After a member has behaved for long enough, its ejection times start again at the first."""
    outlier = Outlier(10, 300)
    back_at = outlier.eject(outlier.eject(0.0))
    assert outlier.eject(back_at + 300) - (back_at + 300) == 30
    back_at = back_at + 300 + 30
    assert outlier.eject(back_at + 301) - (back_at + 301) == 10


def test_an_ejection_forgets_what_led_to_it() -> None:
    outlier = Outlier(10, 300)
    for _ in range(CONSECUTIVE):
        outlier.failed()
    outlier.eject(0.0)
    assert [outlier.failed() for _ in range(CONSECUTIVE)][-2:] == [False, True]


def test_doubtful_answers() -> None:
    """Doubtful answers are remembered for a while, and are no failures by themselves."""
    outlier = Outlier(10, 300)
    for second in range(CONSECUTIVE):
        outlier.answered(float(second), is_well=False)
    assert not outlier.failed()
    outlier.answered(5.0, is_well=True)
    assert outlier.lately(6.0) == (5, 6)
    assert outlier.lately(2.0 + LATELY_SECONDS) == (2, 3)


def test_acquittals_last_longer() -> None:
    """Each acquittal makes a member trusted for longer, until it is ejected."""
    outlier, spans = Outlier(10, 300), []
    for _ in range(14):
        outlier.acquit(0.0)
        spans.append(outlier.trusted_until)
    assert spans[:3] == [5, 10, 15]
    assert spans[-3:] == [60, 60, 60]
    outlier.eject(0.0)
    outlier.acquit(0.0)
    assert outlier.trusted_until == 5
