"""The README's quickstart runs and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from emodistill.runtime import DEFAULT_BUNDLE

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="needs the checkout: the README is not in the wheel")
@pytest.mark.skipif(not DEFAULT_BUNDLE.is_dir(), reason="needs the student that ships with the package")
def test_the_quickstart_prints_what_the_readme_says():
    text = README.read_text(encoding="utf-8")
    code = re.search(r"<!-- quickstart -->\n```python\n(.*?)```", text, re.DOTALL)
    output = re.search(r"<!-- quickstart output -->\n```\n(.*?)```", text, re.DOTALL)
    assert code
    assert output
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output[1]
    assert len(done.stdout.splitlines()) == 8  # the decision, and a probability for each of seven labels
