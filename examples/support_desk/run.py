# SPDX-License-Identifier: Apache-2.0
"""The support desk in good and in bad weather: a real worker and a private Valkey; only the two providers are fakes.

python examples/support_desk/run.py
"""

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from tideover import NotYet, status, wait_for_sync
from tideover.testing import FakeProvider, Fault
from tideover_worker import embedded

HERE = Path(__file__).parent
SOON = timedelta(seconds=60)
SETTINGS = """
redis_url = "{redis}"

[routes.anthropic]
kind = "anthropic"
base_url = "{anthropic}"

[routes.openai]
kind = "openai-compatible"
base_url = "{openai}"
models = {{ "claude-sonnet-5" = "gpt-5.5" }}
"""


def main() -> None:
    anthropic, openai = FakeProvider("anthropic"), FakeProvider("openai", dialect="openai-compatible")
    with tempfile.TemporaryDirectory() as folder, anthropic, openai:
        redis = embedded.start(Path(folder)).url
        config = Path(folder, "tideover.toml")
        config.write_text(SETTINGS.format(redis=redis, anthropic=anthropic.base_url, openai=openai.base_url))
        os.environ |= {"TIDEOVER_CONFIG": str(config), "ANTHROPIC_API_KEY": "a-key-for-the-fake"}
        with Path(folder, "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "dramatiq", "tasks", "-p1", "-t4", "--path", str(HERE)], stderr=log
            )
        try:
            tell_the_story(anthropic)
        finally:
            worker.terminate()
            worker.wait()
            embedded.stop(Path(folder))


def tell_the_story(anthropic: FakeProvider) -> None:
    sys.path.insert(0, str(HERE))
    from tasks import summarise, triage

    tickets = [f"ticket {n}: the invoice is wrong" for n in range(1, 11)]
    routes = {wait_for_sync(triage.send(ticket), timeout=SOON).rpartition("by ")[2].rstrip(")") for ticket in tickets}
    wait_for_sync(summarise.send(tickets[0]), timeout=SOON)
    print(f"fair weather: 10 triages answered by {', '.join(sorted(routes))}")

    anthropic.fail(Fault.OVERLOADED)
    replies = [triage.send(ticket) for ticket in tickets]
    summaries = [summarise.send(ticket) for ticket in tickets]
    routes = {wait_for_sync(reply, timeout=SOON).rpartition("by ")[2].rstrip(")") for reply in replies}
    print(f"anthropic answers 529: 10 triages answered by {', '.join(sorted(routes))}")
    while any(status(summary).state != "held" for summary in summaries):
        time.sleep(0.1)
    try:
        wait_for_sync(summaries[0], timeout=SOON)
    except NotYet:
        print("                       10 summaries held; whoever asks for one hears NotYet")

    anthropic.heal()
    done = [wait_for_sync(summary, timeout=SOON, through_holds=True) for summary in summaries]
    print(f"anthropic is back: {len(done)} summaries done, {sum(text != '' for text in done)} with an answer")


if __name__ == "__main__":
    main()
