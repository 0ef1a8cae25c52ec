"""Bad inputs that clients send (X01 to X20) and security requirements of the gateway (R..), each with the tests that show it.

What is not built says so: ``NOT_BUILT``.
"""

from __future__ import annotations

_BAD = "tests/unit/gateway/test_bad_input.py"
_HTTP = "tests/unit/gateway/test_http.py"
_STREAMS = "tests/unit/gateway/test_streams.py"
_HOSTILE = "tests/unit/gateway/test_hostile_clients.py"
_GRPC = "tests/unit/gateway/test_grpc_inference.py"
_STRUCTURED = "tests/unit/gateway/test_structured_outputs.py"
_ARCHITECTURE = "tests/architecture/test_architecture.py"

BAD_INPUTS: dict[str, tuple[str, ...]] = {
    "X01 no JSON, another content type": (
        f"{_BAD}::test_what_is_not_a_json_object",
        f"{_BAD}::test_other_content_types",
    ),
    "X02 a body over the limit, or without an end": (
        f"{_BAD}::test_body_over_the_limit",
        f"{_STREAMS}::test_a_body_that_does_not_end_is_given_up",
    ),
    "X03 depth, duplicate keys, NaN, surrogates, NUL": (
        f"{_BAD}::test_what_is_not_a_json_object",
        f"{_BAD}::test_unknown_fields_nulls_and_odd_text_are_accepted",
    ),
    "X04 max_tokens": (f"{_BAD}::test_bad_fields_are_named", f"{_BAD}::test_too_long_for_the_context"),
    "X05 numbers out of range": (f"{_BAD}::test_bad_fields_are_named", f"{_BAD}::test_bad_completion_requests"),
    "X06 prompts": (f"{_BAD}::test_bad_completion_requests", f"{_BAD}::test_exactly_the_context_length_is_served"),
    "X07 stop strings": (f"{_BAD}::test_bad_fields_are_named",),
    "X08 unknown models": (f"{_BAD}::test_unknown_model",),
    "X09 keys, hosts and paths": (f"{_HTTP}::test_wrong_keys", f"{_HTTP}::test_no_path_or_host_goes_around_the_key"),
    "X10 roles, images by URL, templates": (f"{_BAD}::test_bad_chat_requests", f"{_BAD}::test_bad_fields_are_named"),
    "X11 hostile schemas": (
        f"{_STRUCTURED}::test_what_cannot_be_followed_is_refused_by_name_and_the_next_request_is_served",
        f"{_STRUCTURED}::test_a_grammar_that_compiles_for_long_is_cut_off",
    ),
    "X12 headers too many, too large, or never finished": (
        f"{_HTTP}::test_oversized_headers",
        f"{_HOSTILE}::test_connections_that_never_finish_their_headers_hold_nobody_up",
        f"{_HOSTILE}::test_bytes_that_are_no_http_end_their_connection_only",
    ),
    "X13 clients that hang up": (
        f"{_STREAMS}::test_many_disconnects_leave_nothing_behind",
        "tests/integration/test_serve.py::test_hundreds_of_disconnects_leave_nothing_behind",
    ),
    "X14 slow readers": (f"{_STREAMS}::test_a_slow_reader_stalls_only_its_own_stream",),
    "X15 requests drawn from the OpenAPI page": (
        "tests/unit/gateway/test_openapi_cases.py::test_no_request_is_an_error_of_the_server",
    ),
    "X16 gRPC: random bytes, unknown methods, large messages": (f"{_HOSTILE}::test_grpc_calls_that_make_no_sense",),
    "X17 gRPC: fields and deadlines": (
        f"{_GRPC}::test_bad_fields_are_named",
        f"{_GRPC}::test_the_callers_deadline_is_the_requests",
    ),
    "X18 gRPC: cancelled calls": (f"{_GRPC}::test_a_cancelled_call_cancels_its_request",),
    "X19 claims on blocks that are somebody else's or over": (
        "tests/unit/kvtransfer/test_agent.py::test_another_sender_than_the_announced_one_is_stale",
        "tests/unit/kvtransfer/test_faults.py::test_an_expired_lease_frees_the_slots_and_everything_later_is_refused",
    ),
    "X20 certificates: none, of another CA, expired, of another role": (
        "tests/integration/test_tls.py::test_rest_is_closed_to_strangers",
        "tests/integration/test_tls.py::test_grpc_is_closed_to_strangers",
        "tests/integration/test_tls.py::test_workers_are_closed_to_strangers",
        "tests/unit/kvtransfer/test_tls.py::test_a_stranger_is_refused_with_a_line_in_the_log",
        "tests/unit/runtime/test_role_check.py::test_a_role_may_call_what_is_its_own_and_nothing_else",
    ),
}

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "R1 R15 R23 nothing executes what it reads": (
        f"{_ARCHITECTURE}::test_nothing_that_executes_what_it_reads",
        "tests/unit/gateway/test_tokenizer.py::test_code_in_the_folder_is_not_run",
    ),
    "R5 what changes the installation is not for tenants, and not on a port that others reach": (
        "tests/unit/gateway/test_planes.py::test_the_table_of_routes_is_this_one",
        "tests/unit/gateway/test_planes.py::test_a_tenant_may_not_do_what_operators_do_and_one_that_is_marked_may",
        "tests/unit/gateway/test_service.py::"
        "test_operators_have_a_listener_and_the_public_one_is_theirs_too_on_loopback_alone",
    ),
    "R6 every route needs a key unless it is listed as open": (
        f"{_HTTP}::test_every_route_needs_a_key_but_the_open_ones",
    ),
    "R7 the path that is routed decides": (f"{_HTTP}::test_no_path_or_host_goes_around_the_key",),
    "R8 keys are kept as digests and compared in constant time": (
        "tests/unit/gateway/test_requirements.py::test_keys_are_compared_in_constant_time",
    ),
    "R9 limits before work": (f"{_HTTP}::test_oversized_headers", f"{_BAD}::test_body_over_the_limit"),
    "R10 n, choices and tokens are bounded": (
        f"{_BAD}::test_bad_fields_are_named",
        f"{_BAD}::test_bad_completion_requests",
    ),
    "R11 no templates of clients, and nothing long on the event loop": (
        f"{_BAD}::test_bad_chat_requests",
        f"{_STREAMS}::test_health_answers_while_a_large_prompt_is_tokenised",
    ),
    "R12 grammars are tried out where they can do no harm": (
        f"{_STRUCTURED}::test_a_grammar_that_compiles_for_long_is_cut_off",
        f"{_STRUCTURED}::test_a_helper_that_is_killed_is_replaced",
    ),
    "R16 R17 no tensors and no addresses from clients": (
        f"{_BAD}::test_bad_fields_are_named",
        f"{_BAD}::test_bad_chat_requests",
    ),
    "R18 public errors come from a catalogue": (f"{_HTTP}::test_an_unforeseen_failure_is_a_500_without_insides",),
    "R22 only granted slots are written": ("tests/unit/kvtransfer/test_agent.py::test_only_granted_slots_are_written",),
    "R26 caches never cross tenants": (
        f"{_HTTP}::test_a_key_is_a_tenant_and_a_tenant_has_its_own_cache",
        "tests/conformance/test_g_agents.py::test_b102_two_tenants_never_share",
    ),
    "R27 a flood of one tenant leaves the others their caches": (
        "tests/integration/test_tenants.py::test_a_flood_of_one_tenant_leaves_another_its_cache",
        "tests/simulation/test_flood.py::test_a_flood_takes_nothing_from_a_tenant_within_its_share",
    ),
    "R29 secrets are files for one user, never arguments": (
        "tests/unit/local/test_private_directory.py::test_it_and_its_secrets_are_for_this_user_only",
        "tests/unit/runtime/test_settings.py::test_secrets_are_never_shown",
    ),
    "R30 names from clients never become paths": (f"{_BAD}::test_unknown_model",),
    "R31 nobody speaks for another worker": (
        "tests/unit/gateway/test_discovery.py::test_nobody_speaks_for_another_worker",
    ),
}

NOT_BUILT = {}
