"""README is short, and its first block is the commands that CI runs."""

from support.markdown import blocks, read


def test_short() -> None:
    assert len(read("README.md").splitlines()) <= 150


def test_first_block_is_the_two_commands() -> None:
    first = next(blocks(read("README.md")))
    install, test = first.code.splitlines()
    assert first.language == "bash"
    assert install.split("#")[0].strip() == "pip install -e '.[test]' && python benchmarks/loss_throughput.py"
    assert test.split("#")[0].strip() == "pytest"
