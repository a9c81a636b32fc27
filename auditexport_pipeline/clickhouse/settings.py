"""What our statements say to ClickHouse about settings, so that nothing that matters is inherited.

Every setting that changes what a statement means goes into the statement's own SETTINGS clause: proxies such as chproxy
drop all but a dozen of those in a URL. A profile, a role or a proxy's own parameters set the others. What a profile may
go on deciding is what changes cost and not meaning: memory, threads, logging, networks.

Went through once: `system.settings` of 25.8, 26.3 and 26.9. What a server does not list is not sent (`stated`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Value = str | int | float
# A setting of which ClickHouse takes no empty value is taken back so.
DEFAULT = "DEFAULT"

# What every statement of ours says. `compatibility` stands first: it takes back what an older default would change, and
# leaves alone what a profile names itself, which is why the others are named too.
EVERYWHERE: dict[str, Value] = {
    "compatibility": "",
    # Each adds a clause, a filter or an end to statements that have none.
    "limit": 0,
    "offset": 0,
    "page": 0,
    "select": "",
    "filter": "",
    "order": "",
    "sort": "",
    "final": 0,
    "additional_table_filters": "{}",
    "additional_result_filter": "",
    "implicit_table_at_top_level": "",
    "extremes": 0,
    "discard_query_data": 0,
    "run_query_in_background": 0,
    # What is too much is an error, never a shorter answer; and the number of rows is no reason to refuse one.
    "read_overflow_mode": "throw",
    "read_overflow_mode_leaf": "throw",
    "result_overflow_mode": "throw",
    "timeout_overflow_mode": "throw",
    "timeout_overflow_mode_leaf": "throw",
    "group_by_overflow_mode": "throw",
    "sort_overflow_mode": "throw",
    "distinct_overflow_mode": "throw",
    "set_overflow_mode": "throw",
    "join_overflow_mode": "throw",
    "transfer_overflow_mode": "throw",
    "max_rows_to_read": 0,
    "max_bytes_to_read": 0,
    "max_rows_to_read_leaf": 0,
    "max_bytes_to_read_leaf": 0,
    "max_result_rows": 0,
    "max_result_bytes": 0,
    "max_rows_to_group_by": 0,
    "max_rows_to_sort": 0,
    "max_bytes_to_sort": 0,
    "max_rows_in_distinct": 0,
    "max_bytes_in_distinct": 0,
    "max_rows_in_set": 0,
    "max_bytes_in_set": 0,
    "max_partitions_to_read": -1,
    # Look-ups by inserted_at use a skip index and the partitions, not the sort key.
    "force_data_skipping_indices": DEFAULT,
    "force_primary_key": 0,
    "force_index_by_date": 0,
    "force_optimize_projection": 0,
    "force_optimize_projection_name": "",
    # What words mean.
    "prefer_column_name_to_alias": 0,
    "aggregate_functions_null_for_empty": 0,
    "empty_result_for_aggregation_by_empty_set": 0,
    "group_by_use_nulls": 0,
    "join_use_nulls": 0,
    "transform_null_in": 0,
    "count_distinct_implementation": "uniqExact",
    "session_timezone": "",
    "enable_named_columns_in_function_tuple": 0,
    "legacy_column_name_of_tuple_literal": 0,
    "cast_keep_nullable": 0,
    "cast_string_to_dynamic_use_inference": 0,
    "allow_custom_error_code_in_throwif": 0,
    # Rows as they are: without those that were deleted, from no cache and from no part of the replicas.
    "apply_deleted_mask": 1,
    "apply_patch_parts": 1,
    "use_query_cache": 0,
    "enable_parallel_replicas": 0,
    # Over a Distributed table, all shards answer or nobody does. Which shard a block is on is never worked out, for it
    # stays where it is when shards are added.
    "skip_unavailable_shards": 0,
    "optimize_skip_unused_shards": 0,
    "distributed_group_by_no_merge": 0,
    # JSON keys keep their dots (stored as %2E), or {"a.b": 1} would silently become {"a": {"b": 1}}.
    "json_type_escape_dots_in_keys": 1,
    # The text of a meta: the mirrors are computed at an INSERT and compared at every reconciliation.
    "output_format_json_quote_64bit_integers": 0,
    "output_format_json_quote_64bit_floats": 0,
    "output_format_json_quote_decimals": 0,
    "output_format_json_quote_denormals": 0,
    "output_format_json_escape_forward_slashes": 1,
    "output_format_json_named_tuples_as_objects": 1,
    "output_format_json_skip_null_value_in_named_tuples": 0,
    "output_format_json_map_as_array_of_tuples": 0,
    "output_format_decimal_trailing_zeros": 0,
    "date_time_output_format": "simple",
    "bool_true_representation": "true",
    "bool_false_representation": "false",
}

READ_SETTINGS: dict[str, Value] = {
    **EVERYWHERE,
    # Ours is the form of the answer too: JSON, and valid whatever bytes somebody else's entry holds.
    "output_format_json_validate_utf8": 1,
    "http_write_exception_in_output_format": 0,
}

# What an INSERT says beside `EVERYWHERE`, each because leaving it to the server's default changes or loses something.
INSERT_SETTINGS: dict[str, Value] = {
    "async_insert": 0,  # on by default since 26.3: acknowledged before it is durable
    "insert_deduplicate": 1,
    # A replay reaches the targets of materialized views too: those with a deduplication window take a block once.
    "deduplicate_blocks_in_dependent_materialized_views": 1,
    # A view that fails is answered as an error, so that the operator learns of it.
    "materialized_views_ignore_errors": 0,
    # A profile may turn the token off for INSERT … SELECT, which ours is; and servers of early 2026 did so by themselves
    # unless the SELECT was sorted (ClickHouse pull request 99206). Servers before that go by insert_deduplicate alone.
    "deduplicate_insert": "enable",
    "deduplicate_insert_select": "enable_even_for_bad_queries",
    "implicit_transaction": 0,
    # Into a Distributed table: acknowledged when a shard has the block, not when it is queued on the way there. Any other
    # table takes no notice of it.
    "distributed_foreground_insert": 1,
    "insert_shard_id": 0,
    "insert_distributed_one_random_shard": 0,
    # One block and one part: squash until the end, never split.
    "max_insert_block_size": 10_000_000,
    "max_insert_block_size_bytes": 0,
    "min_insert_block_size_rows": 10_000_000,
    "min_insert_block_size_bytes": 4 * 1024**3,
    "use_strict_insert_block_limits": 0,
    "max_insert_threads": 1,
    # No merge of a block with itself: `core.export.fetch` leaves each event in it once, and merging copied every
    # row, 13 of 27 µs. Parsed by one thread: a block beside it is parsed at the same time, and CPU is 10 % less.
    "optimize_on_insert": 0,
    "input_format_parallel_parsing": 0,
    "input_format_allow_errors_num": 0,
    "input_format_allow_errors_ratio": 0,
    "input_format_skip_unknown_fields": 1,
    "input_format_null_as_default": 0,  # explained at `input` in audit_log_v1.sql
    "input_format_defaults_for_omitted_fields": 1,
    "input_format_json_empty_as_default": 0,
    # Strings stay strings and booleans booleans: by default "2024-01-01T10:00:00Z" inside a meta becomes
    # another text, [true, 1] becomes [1, 1] and [1, "a"] becomes ["1", "a"].
    "input_format_try_infer_dates": 0,
    "input_format_try_infer_datetimes": 0,
    "input_format_try_infer_datetimes_only_datetime64": 0,
    "input_format_try_infer_integers": 1,
    "input_format_try_infer_exponent_floats": 0,
    "input_format_try_infer_variants": 0,
    "input_format_json_try_infer_numbers_from_strings": 0,
    "input_format_json_try_infer_named_tuples_from_objects": 1,
    "input_format_json_infer_incomplete_types_as_strings": 1,
    "input_format_json_infer_array_of_dynamic_from_array_of_different_types": 1,
    "input_format_json_read_bools_as_strings": 0,
    "input_format_json_read_bools_as_numbers": 0,
    "input_format_json_read_numbers_as_strings": 0,
    "input_format_json_read_arrays_as_strings": 1,
    "input_format_json_read_objects_as_strings": 1,
    "input_format_json_named_tuples_as_objects": 1,
    "input_format_json_ignore_unknown_keys_in_named_tuple": 1,
    "input_format_json_defaults_for_missing_elements_in_named_tuple": 1,
    "input_format_json_ignore_unnecessary_fields": 1,
    "input_format_json_max_depth": 1000,
    "precise_float_parsing": 1,  # off by default in 25.8: the last digit of a number may differ
    "date_time_input_format": "basic",
    # "Description" is not description, for msgspec as for everybody else. Servers before 26.9 have no other mode.
    "input_format_column_name_matching_mode": "match_case",
    # What cannot be kept is refused, loudly: the row becomes a dead letter with a reason.
    "type_json_skip_duplicated_paths": 0,
    "type_json_skip_invalid_typed_paths": 0,
    "type_json_skip_null_typed_paths": 0,
    "input_format_json_throw_on_bad_escape_sequence": 1,
    # Allowed by default since 26.3: {"a": 1, "a": {"b": 2}} would be stored with both, a null after it with none. Servers
    # that do not know the setting refuse the first.
    "type_json_allow_duplicated_key_with_literal_and_nested_object": 0,
    # Each path of a JSON column beyond it shares one subcolumn, with the same meaning. A wide part opens some
    # ten files a path: 10,000 rows of 3,000 distinct keys in three metas ran into a limit of 20,000 files at
    # the default of 1,024 (and at 512), so that the batch could never be written.
    "max_dynamic_subcolumns_in_json_type_parsing": 128,
    # Skip indexes are built when parts merge, as they are again at every merge; a fresh part is one block, pruned
    # by its only inserted_at. Building them at the INSERT as well took 8 of 35 µs a row.
    "materialize_skip_indexes_on_insert": 0,
}

# What decides how a table is created.
DDL_SETTINGS: dict[str, Value] = {
    "compatibility": "",
    "data_type_default_nullable": 0,
    "flatten_nested": 1,
    "session_timezone": "",
    "json_type_escape_dots_in_keys": 1,
}

# A SELECT that carries payloads as a parameter: not in the server's query log.
CONTENT_SETTINGS: dict[str, Value] = {"log_queries": 0}

# These change what a statement costs: where a profile has fixed another value, it stands.
COST = frozenset(
    """max_insert_threads optimize_on_insert input_format_parallel_parsing max_dynamic_subcolumns_in_json_type_parsing
    materialize_skip_indexes_on_insert max_execution_time log_queries http_write_exception_in_output_format
    insert_quorum_timeout""".split()  # noqa: SIM905 - a list of quoted words hides the words
)
# And these families decide how text is read and written. One that a profile has changed and that has no line above, in
# whatever version, is set back to ClickHouse's own default.
_FAMILIES = re.compile(
    r"(input_format_json_|input_format_try_|input_format_null|output_format_json_|type_json_|json_|cast_|variant_|dynamic_throw_|"
    r"analyzer_compatibility_|force_(?!remove)|date_time_)"
)

# What a server without the setting does differently; `doctor` says so.
STANDS_IN: dict[str, str] = {
    "deduplicate_insert": "insert_deduplicate alone turns the token on",
    "deduplicate_insert_select": "insert_deduplicate alone turns the token on",
    "input_format_column_name_matching_mode": "names of fields are matched by case, the only way there is",
    "type_json_allow_duplicated_key_with_literal_and_nested_object": "such a key is refused by the type itself",
    "type_json_skip_invalid_typed_paths": "such a value is refused by the type itself",
    "type_json_skip_null_typed_paths": "such a null is kept by the type itself",
    "max_dynamic_subcolumns_in_json_type_parsing": "a JSON column has up to 1,024 subcolumns: metas of thousands of distinct "
    "keys take more files a part (max_dynamic_paths of the column's type limits them)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A setting as the server lists it for our user; `least` and `most` are the bounds of a constraint."""

    value: str
    changed: bool
    fixed: bool
    least: str | None
    most: str | None

    def means(self, wanted: Value) -> bool:
        """Whether it stands so already."""
        return not self.changed if wanted == DEFAULT else same(self.value, wanted)

    def refuses(self, wanted: Value) -> bool:
        """Whether our user may not set it so."""
        if self.means(wanted):
            return False
        return self.fixed or _below(str(wanted), self.least) or _below(self.most, str(wanted))


def _below(left: str | None, right: str | None) -> bool:
    try:
        return left is not None and right is not None and float(left) < float(right)
    except ValueError:
        return False


def same(listed: str, wanted: Value) -> bool:
    """Whether the server's text of a value means this one."""
    return {"true": "1", "false": "0"}.get(listed, listed) == str(wanted)


def stated(wanted: Mapping[str, Value], listed: Mapping[str, Listed], *, strict: bool = True) -> str:
    """The SETTINGS clause with those of `wanted` that the server lists, and what its profile changed in our families.

    What our user may not set is stated too, and refused by the server, unless `strict` is off.
    """
    parts = []
    for name, value in wanted.items():
        here = listed.get(name)
        if here is None or (here.fixed and here.means(value)):
            continue
        if not strict and here.refuses(value):
            continue
        if name in COST and here.refuses(value):
            if name != "max_execution_time" or here.fixed or here.most is None:
                continue
            value = here.most  # an earlier end is as good
        parts.append(f"{name} = {literal(value)}")
    parts += [
        f"{name} = DEFAULT"
        for name, here in listed.items()
        if here.changed and not here.fixed and name not in wanted and _FAMILIES.match(name)
    ]
    return "SETTINGS " + ", ".join(parts) if parts else ""


def refused(wanted: Mapping[str, Value], listed: Mapping[str, Listed]) -> dict[str, tuple[Value, str]]:
    """Settings that mean something and that our user may not set as they must be: what is wanted, and what stands there."""
    return {
        name: (value, here.value)
        for name, value in wanted.items()
        if name not in COST and (here := listed.get(name)) is not None and here.refuses(value)
    }


def missing(wanted: Iterable[str], listed: Mapping[str, Listed]) -> dict[str, str]:
    """Settings that this server does not know and whose absence shows, with what stands in for each."""
    return {name: STANDS_IN[name] for name in wanted if name in STANDS_IN and name not in listed}


def literal(value: Value) -> str:
    if not isinstance(value, str):
        return str(value)
    if value in ("{}", DEFAULT):  # an empty map
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
