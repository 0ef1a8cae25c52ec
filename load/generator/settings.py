"""Options of ``baton bench``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from baton.load.generator.arrivals import Arrival
from baton.load.generator.http_client import Target
from baton.load.generator.metrics import Slo
from baton.load.generator.workload import Lengths
from baton.services.runtime.option_set import OptionSet, StringList, readable

DEFAULT_NUM_PROMPTS = 100
_GOODPUT = re.compile(r"(ttft|tpot|e2el):(\d+(?:\.\d+)?)")


def _split(value: Any) -> Any:
    """``"ttft:500 tpot:50"``, several such options, or a YAML list: one list."""
    parts = [value] if isinstance(value, str) else value
    return [word for part in parts for word in re.split(r"[,\s]+", str(part)) if word] if parts else parts


Words = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Numbers = Annotated[list[float], NoDecode, BeforeValidator(_split)]


class ServerOptions(OptionSet):
    """Whom to ask, and how."""

    panel = "Server"

    url: str = Field("http://127.0.0.1:8000", description="The server: anything that speaks OpenAI's API.")
    api_key: SecretStr | None = Field(None, description="API key.")
    ca_file: Path | None = Field(
        None, description="CA that signed the certificate of an https:// URL. Default: SSL_CERT_FILE, or the system's."
    )
    served_model_name: str | None = Field(None, description="Model to ask for. Default: the first one of /v1/models.")
    endpoint: Literal["chat", "completions"] = Field("chat", description="Which API.")
    prompt: Literal["text", "token-ids"] = Field(
        "text", description="Prompts as words, or as token ids of exact length (completions only)."
    )
    ignore_eos: bool = Field(
        True, description="Ask for answers of the planned length. OpenAI's own server does not know the field."
    )
    temperature: float | None = Field(None, ge=0, description="Default: the server's.")
    extra_body: str | None = Field(None, description="JSON object that is added to every body.")
    header: StringList = Field([], description="NAME:VALUE that is added to every request; repeatable.")
    timeout_s: float = Field(
        600.0, gt=0, description="A request that has not ended so long after it was due is a miss."
    )

    @field_validator("ca_file")
    @classmethod
    def _check_ca(cls, path: Path | None) -> Path | None:
        return readable(path)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        Target.parse(url)
        return url

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str, info: ValidationInfo) -> str:
        if prompt == "token-ids" and info.data.get("endpoint") == "chat":
            raise ValueError("token ids need --endpoint completions")
        return prompt

    @field_validator("extra_body")
    @classmethod
    def _check_extra_body(cls, extra_body: str | None) -> str | None:
        if extra_body is not None:
            try:
                is_object = isinstance(json.loads(extra_body), dict)
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from None
            if not is_object:
                raise ValueError("must be a JSON object")
        return extra_body

    @field_validator("header")
    @classmethod
    def _check_header(cls, header: list[str]) -> list[str]:
        for line in header:
            if not re.fullmatch(r"[A-Za-z0-9-]+:[^\r\n]*", line):
                raise ValueError(f"must be NAME:VALUE, got {line!r}")
        return header

    def headers(self) -> dict[str, str]:
        """Of every request, the key among them."""
        pairs = (line.partition(":") for line in self.header)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key.get_secret_value()}"
        return headers


class WorkloadOptions(ServerOptions):
    """What is sent when."""

    panel = "Workload"

    trace: Path | None = Field(
        None,
        description="Lengths, times and shared prefixes from a file: Mooncake or Bailian JSONL, Azure or BurstGPT CSV.",
    )
    arrival: Arrival | None = Field(None, description="Default: the trace's times, or poisson without one.")
    request_rate: float = Field(1.0, gt=0, description="Mean requests a second; with --arrival trace not used.")
    burstiness: float | None = Field(
        None, gt=0, description="Shape of gamma arrivals: below 1 bursts, 1 is poisson, above 1 more even."
    )
    num_prompts: int | None = Field(
        None, ge=1, description=f"At most so many conversations. Default: the whole trace, or {DEFAULT_NUM_PROMPTS}."
    )
    duration_s: float | None = Field(None, gt=0, description="Nothing new begins later than this.")
    time_scale: float = Field(1.0, gt=0, description="The trace's times are multiplied by it: 0.5 is twice as fast.")
    length_scale: float = Field(1.0, gt=0, description="The trace's lengths, and its blocks, are multiplied by it.")
    max_input_len: int | None = Field(None, ge=1, description="Longer prompts of a trace are cut.")
    max_output_len: int | None = Field(None, ge=1, description="Longer answers of a trace are cut.")
    input_len: int = Field(256, ge=1, description="Prompt tokens without a trace.")
    output_len: int = Field(64, ge=1, description="Answer tokens without a trace.")
    prefix_len: int = Field(0, ge=0, description="Tokens before each prompt that are the same for all.")
    length_spread: float = Field(0.0, ge=0, lt=1, description="0.5: lengths from half to one and a half of these.")
    turns: int = Field(1, ge=1, description="Turns of a conversation; each later one waits for the answer before it.")
    turn_input_len: int = Field(64, ge=1, description="Prompt tokens that each later turn adds.")
    pause_s: float = Field(0.0, ge=0, description="Mean pause before a later turn, exponential.")
    seed: int = Field(0, ge=0, description="Equal seeds send the same prompts at the same moments.")

    @field_validator("trace")
    @classmethod
    def _check_trace(cls, trace: Path | None) -> Path | None:
        if trace is not None and not trace.is_file():
            raise ValueError(f"no such file: {trace}")
        return trace

    @field_validator("arrival")
    @classmethod
    def _check_arrival(cls, arrival: Arrival | None, info: ValidationInfo) -> Arrival | None:
        if arrival is Arrival.TRACE and info.data.get("trace") is None:
            raise ValueError("trace needs --trace FILE")
        return arrival

    @field_validator("burstiness")
    @classmethod
    def _check_burstiness(cls, burstiness: float | None, info: ValidationInfo) -> float | None:
        if burstiness is not None and info.data.get("arrival") not in (None, Arrival.GAMMA):
            raise ValueError(f"belongs to --arrival gamma, not to {info.data['arrival'].value}")
        return burstiness

    @field_validator("turns")
    @classmethod
    def _check_turns(cls, turns: int, info: ValidationInfo) -> int:
        if turns > 1 and info.data.get("trace") is not None:
            raise ValueError("the requests of a trace are single turns")
        return turns

    @property
    def chosen_arrival(self) -> Arrival:
        if self.arrival is not None:
            return self.arrival
        if self.burstiness is not None:
            return Arrival.GAMMA
        return Arrival.TRACE if self.trace is not None else Arrival.POISSON

    def lengths(self) -> Lengths:
        return Lengths(
            input_len=self.input_len,
            output_len=self.output_len,
            prefix_len=self.prefix_len,
            spread=self.length_spread,
            turn_input_len=self.turn_input_len,
            num_turns=self.turns,
            pause_s=self.pause_s,
        )


class BenchSettings(WorkloadOptions):
    """``baton bench``."""

    panel = "Measurement"

    goodput: Words = Field(
        [],
        description='Targets in ms that make a request good: "ttft:500 tpot:50", or e2el. Also sent with --send-slo.',
    )
    send_slo: bool = Field(
        False, description="Tell the server the ttft and tpot targets (x-slo-ttft-ms, x-slo-tpot-ms)."
    )
    min_attainment: float | None = Field(
        None, ge=0, le=1, description="Exit with 1 where a smaller share of the requests was good."
    )
    num_warmups: int = Field(4, ge=0, description="Requests before the run that are not counted.")
    max_concurrency: int | None = Field(
        None, ge=1, description="Closed loop: requests wait for one of so many; the wait counts in their TTFT."
    )
    metric_percentiles: Numbers = Field([50, 90, 95, 99], description="Percentiles to report; repeatable.")
    output: Path | None = Field(None, description="JSON with the figures. Default: bench-results/serve-DATE.json.")
    save: bool = Field(True, description="Write the JSON.")
    save_detailed: bool = Field(False, description="With lists of every length and time in it.")
    records: Path | None = Field(None, description="JSON lines, one for each request.")
    label: str | None = Field(None, description="Stands in the JSON, for telling runs apart.")
    progress: bool = Field(True, description="A bar on a terminal.")
    self_check: bool = Field(
        False, description="Measure this generator against a server that answers at once, and stop."
    )

    @field_validator("goodput")
    @classmethod
    def _check_goodput(cls, goodput: list[str]) -> list[str]:
        for target in goodput:
            if not _GOODPUT.fullmatch(target):
                raise ValueError(f"must be ttft:MS, tpot:MS or e2el:MS, got {target!r}")
        return goodput

    @field_validator("send_slo")
    @classmethod
    def _check_send_slo(cls, send_slo: bool, info: ValidationInfo) -> bool:
        if send_slo and not any(target.startswith(("ttft", "tpot")) for target in info.data.get("goodput") or ()):
            raise ValueError("needs --goodput with ttft or tpot")
        return send_slo

    @field_validator("metric_percentiles")
    @classmethod
    def _check_percentiles(cls, percentiles: list[float]) -> list[float]:
        for percent in percentiles:
            if not 0 <= percent <= 100:
                raise ValueError(f"must be between 0 and 100, got {percent:g}")
        return sorted(set(percentiles))

    def targets_ms(self) -> dict[str, float]:
        """By name."""
        matches = [_GOODPUT.fullmatch(target) for target in self.goodput]
        return {match[1]: float(match[2]) for match in matches if match}

    def slo(self) -> Slo:
        return Slo(**{f"{name}_s": target / 1e3 for name, target in self.targets_ms().items()})
