"""Small pools for the tests: texts say what they are, so that a row shows which candidates it was made of."""

from vlm_sft_rl.self_training.pool import Candidate

QUESTION = {"id": "q1", "images": ["a.png"], "question": "How many?", "answer": "GOLD"}


def candidate(
    number: int, status: str, *, question: str = "q1", key: str | None = None, text: str = ""
) -> Candidate:
    """Sample `number` of a question, three a round; `status` is one of right, wrong, unreadable."""
    key = key or ("7" if status == "right" else None if status == "unreadable" else f"w{number}")
    text = text or f"{status}{number} step step. So the answer is {key}."
    return Candidate(question, number // 3, number % 3, text, key, key, status)


def candidates(statuses: str, question: str = "q1") -> list[Candidate]:
    """From letters, oldest first: R right, W wrong, F unreadable."""
    names = {"R": "right", "W": "wrong", "F": "unreadable"}
    return [candidate(i, names[letter], question=question) for i, letter in enumerate(statuses)]
