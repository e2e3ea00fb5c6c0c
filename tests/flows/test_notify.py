"""Whom Prefect tells of failed runs and changes of champion."""

import asyncio

import pytest
from prefect import get_client

from flows.settings import Settings
from flows.stack.deployments import WEBHOOK, apply_deployments, default_file, read_deployments

SECRET = "https://chat.example/hooks/3f9a"  # noqa: S105  (nobody's)


@pytest.mark.usefixtures("prefect_server")
def test_a_webhook_is_kept_without_showing_it() -> None:
    """Two more automations once there is a webhook, also when it is applied again without; its address is shown to nobody."""
    read = read_deployments(default_file())

    async def apply() -> list[int]:
        applied = [await apply_deployments(read, notify_url=url) for url in (None, SECRET, None, SECRET)]
        async with get_client() as client:
            assert len(await client.read_automations()) == len(applied[-1].automations), "none was made twice"
            for is_whole in (True, False):
                block = await client.read_block_document_by_name(WEBHOOK, "custom-webhook", include_secrets=is_whole)
                assert (SECRET in block.model_dump_json()) == is_whole
        return [len(a.automations) for a in applied]

    assert asyncio.run(apply()) == [2, 4, 4, 4]


@pytest.mark.parametrize("url", ["ftp://chat.example/3f9a-secret", "3f9a-secret"])
def test_an_address_that_is_none_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The message names the variable and not its content."""
    monkeypatch.setenv("PROXYROB_NOTIFY_URL", url)
    with pytest.raises(ValueError, match="PROXYROB_NOTIFY_URL: expected the address of a webhook") as refused:
        _ = Settings().webhook
    assert "3f9a" not in str(refused.value)
