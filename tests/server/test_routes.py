"""What GET says: the model, the counters, the page."""

from __future__ import annotations

from serving import CHAT, CHATS, COMPLETIONS, NAME, Running


def test_models(here: Running) -> None:
    body = here.client.get("/v1/models").json()
    (model,) = body["data"]
    assert (body["object"], model["id"], model["object"], model["max_model_len"]) == ("list", NAME, "model", 512)
    assert here.client.get(f"/v1/models/{NAME}").json() == model
    for answer in (here.client.get("/v1/models/other/x"), here.post(CHATS, messages=CHAT, model="other")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_metrics_count_what_was_done(here: Running) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
             "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
             "time_per_output_token_seconds_count", "e2e_request_latency_seconds_count",
             "request_queue_time_seconds_count")  # fmt: skip
    before = {name: here.metric(name) for name in names}
    ended = here.metric("request_success_total", finished_reason="length")
    here.post(COMPLETIONS, prompt=[7] * 10, max_tokens=5, ignore_eos=True)
    here.post(COMPLETIONS, prompt=[7] * 10, max_tokens=5, ignore_eos=True)
    here.idle()
    after = {name: here.metric(name) - before[name] for name in names}
    assert after == dict(zip(names, (20, 10, 20, after["prefix_cache_hits_total"], 2, 8, 2, 2, 2), strict=True))
    assert 9 <= after["prefix_cache_hits_total"] <= 18
    assert here.metric("request_success_total", finished_reason="length") == ended + 2
    text = here.client.get("/metrics").text
    assert 'le="5e-05"' in text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gb_per_s"):
        assert here.metric(name) == 0


def test_the_page_may_load_nothing_from_elsewhere(here: Running) -> None:
    answer = here.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
