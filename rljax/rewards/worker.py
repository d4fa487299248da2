"""The child process of a reward runner: reads calls from standard input, writes scores to standard output.

Started as ``python -m rljax.rewards.worker`` and not by multiprocessing, which would import the training program again
in every child.
"""

import os
import pickle
import signal

from rljax.rewards.base import as_reward, one_line, score_or_reason


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a reward prints must not stand between the scores

    def reply(answer: object) -> None:
        replies.write(pickle.dumps(answer))
        replies.flush()

    try:
        rewards, limit_s = pickle.load(requests)
        functions = [as_reward(reward) for reward in rewards]
    except Exception as error:
        return reply(one_line(error))
    reply(None)
    while True:
        try:
            index, samples = pickle.load(requests)
        except EOFError:  # the parent has closed or gone
            return
        # The parent kills at the deadline; this alarm is for a parent that was killed itself.
        signal.setitimer(signal.ITIMER_REAL, limit_s + 5)
        answer = score_or_reason(functions[index], samples)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(answer)


if __name__ == "__main__":
    main()
