"""The settings that our statements send to ClickHouse, so that nothing that matters is inherited.

Every setting that changes the meaning of a statement is in the statement's own SETTINGS clause: proxies such as chproxy
drop most settings of a URL. Profiles still decide about cost: memory, threads, logging, networks.

The list was compared with `system.settings` of 25.8, 26.3 and 26.9. Settings that a server does not list are not sent
(`stated`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Value = str | int | float
# Resets a setting for which ClickHouse takes no empty value.
DEFAULT = "DEFAULT"


def _each(value: Value, names: str) -> dict[str, Value]:
    return dict.fromkeys(names.split(), value)


# For each of our statements. `compatibility` comes first: it restores the defaults that an older value changed. It
# does not change settings that a profile names; therefore the others follow.
EVERYWHERE: dict[str, Value] = {
    "compatibility": "",
    # Each adds a LIMIT, a filter or an early end to a statement.
    **_each(0, "limit offset page final extremes discard_query_data run_query_in_background"),
    **_each("", "select filter order sort additional_result_filter implicit_table_at_top_level"),
    "additional_table_filters": "{}",
    # Too much is an error, never a shorter answer; and the number of rows is no reason to refuse a statement.
    **_each("throw", "read_overflow_mode read_overflow_mode_leaf result_overflow_mode timeout_overflow_mode"),
    **_each("throw", "timeout_overflow_mode_leaf group_by_overflow_mode sort_overflow_mode distinct_overflow_mode"),
    **_each("throw", "set_overflow_mode join_overflow_mode transfer_overflow_mode"),
    **_each(0, "max_rows_to_read max_bytes_to_read max_rows_to_read_leaf max_bytes_to_read_leaf max_result_rows"),
    **_each(0, "max_result_bytes max_rows_to_group_by max_rows_to_sort max_bytes_to_sort max_rows_in_distinct"),
    **_each(0, "max_bytes_in_distinct max_rows_in_set max_bytes_in_set"),
    "max_partitions_to_read": -1,
    # Look-ups by inserted_at use a skip index and the partitions, not the sort key.
    "force_data_skipping_indices": DEFAULT,
    "force_optimize_projection_name": "",
    **_each(0, "force_primary_key force_index_by_date force_optimize_projection"),
    # Settings that change what SQL means.
    **_each(0, "prefer_column_name_to_alias aggregate_functions_null_for_empty group_by_use_nulls join_use_nulls"),
    **_each(0, "empty_result_for_aggregation_by_empty_set transform_null_in enable_named_columns_in_function_tuple"),
    **_each(0, "legacy_column_name_of_tuple_literal cast_keep_nullable cast_string_to_dynamic_use_inference"),
    "allow_custom_error_code_in_throwif": 0,
    "count_distinct_implementation": "uniqExact",
    "session_timezone": "",
    # Rows as they are: without deleted ones, not from a cache, and all from one replica.
    **_each(1, "apply_deleted_mask apply_patch_parts"),
    **_each(0, "use_query_cache enable_parallel_replicas"),
    # Over a Distributed table all shards answer, or the statement fails. The shard of a block is never computed: a
    # block stays where it is when shards are added.
    **_each(0, "skip_unavailable_shards optimize_skip_unused_shards distributed_group_by_no_merge"),
    # JSON keys keep their dots (stored as %2E), or {"a.b": 1} would silently become {"a": {"b": 1}}.
    "json_type_escape_dots_in_keys": 1,
    # The text of a meta: the mirrors are computed at an INSERT and compared at every reconciliation.
    **_each(0, "output_format_json_quote_64bit_integers output_format_json_quote_64bit_floats"),
    **_each(0, "output_format_json_quote_decimals output_format_json_quote_denormals"),
    **_each(0, "output_format_json_skip_null_value_in_named_tuples output_format_json_map_as_array_of_tuples"),
    **_each(1, "output_format_json_escape_forward_slashes output_format_json_named_tuples_as_objects"),
    "output_format_decimal_trailing_zeros": 0,
    "date_time_output_format": "simple",
    "bool_true_representation": "true",
    "bool_false_representation": "false",
}

READ_SETTINGS: dict[str, Value] = {
    **EVERYWHERE,
    # The answer is valid JSON, whatever bytes the entries of other writers hold.
    "output_format_json_validate_utf8": 1,
    "http_write_exception_in_output_format": 0,
}

# For INSERTs, beside `EVERYWHERE`: the server's default would change or lose something.
INSERT_SETTINGS: dict[str, Value] = {
    "async_insert": 0,  # on by default since 26.3: acknowledged before it is durable
    "insert_deduplicate": 1,
    # A replay reaches the targets of materialized views too: those with a deduplication window take a block once.
    "deduplicate_blocks_in_dependent_materialized_views": 1,
    # A view that fails is answered as an error, so that the operator learns of it.
    "materialized_views_ignore_errors": 0,
    # A profile can turn the token off for INSERT … SELECT, which ours is. Servers of early 2026 did so unless the
    # SELECT was sorted (ClickHouse pull request 99206). Older servers only read insert_deduplicate.
    "deduplicate_insert": "enable",
    "deduplicate_insert_select": "enable_even_for_bad_queries",
    "implicit_transaction": 0,
    # A Distributed table acknowledges when a shard has the block, not when the block is queued. Other tables ignore it.
    "distributed_foreground_insert": 1,
    **_each(0, "insert_shard_id insert_distributed_one_random_shard"),
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
    **_each(0, "input_format_allow_errors_num input_format_allow_errors_ratio input_format_json_empty_as_default"),
    **_each(1, "input_format_skip_unknown_fields input_format_defaults_for_omitted_fields"),
    "input_format_null_as_default": 0,  # explained at `input` in audit_log_v1.sql
    # Strings stay strings and booleans booleans: by default "2024-01-01T10:00:00Z" inside a meta becomes
    # another text, [true, 1] becomes [1, 1] and [1, "a"] becomes ["1", "a"].
    **_each(0, "input_format_try_infer_dates input_format_try_infer_datetimes input_format_try_infer_variants"),
    **_each(0, "input_format_try_infer_datetimes_only_datetime64 input_format_try_infer_exponent_floats"),
    **_each(0, "input_format_json_try_infer_numbers_from_strings input_format_json_read_bools_as_strings"),
    **_each(0, "input_format_json_read_bools_as_numbers input_format_json_read_numbers_as_strings"),
    **_each(1, "input_format_try_infer_integers input_format_json_try_infer_named_tuples_from_objects"),
    **_each(1, "input_format_json_infer_incomplete_types_as_strings input_format_json_read_arrays_as_strings"),
    **_each(1, "input_format_json_infer_array_of_dynamic_from_array_of_different_types"),
    **_each(1, "input_format_json_read_objects_as_strings input_format_json_named_tuples_as_objects"),
    **_each(1, "input_format_json_ignore_unknown_keys_in_named_tuple input_format_json_ignore_unnecessary_fields"),
    **_each(1, "input_format_json_defaults_for_missing_elements_in_named_tuple"),
    "input_format_json_max_depth": 1000,
    "precise_float_parsing": 1,  # off by default in 25.8: the last digit of a number may differ
    "date_time_input_format": "basic",
    # "Description" is not description, as in msgspec. Servers before 26.9 have no other mode.
    "input_format_column_name_matching_mode": "match_case",
    # A value that cannot be stored as it is, is refused: the row becomes a dead letter with a reason.
    **_each(0, "type_json_skip_duplicated_paths type_json_skip_invalid_typed_paths type_json_skip_null_typed_paths"),
    "input_format_json_throw_on_bad_escape_sequence": 1,
    # Allowed by default since 26.3: {"a": 1, "a": {"b": 2}} would be stored with both, a null after it with none.
    # Servers that do not know the setting refuse the first.
    "type_json_allow_duplicated_key_with_literal_and_nested_object": 0,
    # Each path of a JSON column beyond it shares one subcolumn, with the same meaning. A wide part opens some
    # ten files a path: 10,000 rows of 3,000 distinct keys in three metas ran into a limit of 20,000 files at
    # the default of 1,024 (and at 512), so that the batch could never be written.
    "max_dynamic_subcolumns_in_json_type_parsing": 128,
    # Skip indexes are built when parts merge, as they are again at every merge; a fresh part is one block, pruned
    # by its only inserted_at. Building them at the INSERT as well took 8 of 35 µs a row.
    "materialize_skip_indexes_on_insert": 0,
}

# For CREATE statements.
DDL_SETTINGS: dict[str, Value] = {
    "compatibility": "",
    "data_type_default_nullable": 0,
    "flatten_nested": 1,
    "session_timezone": "",
    "json_type_escape_dots_in_keys": 1,
}

# A SELECT that carries payloads as a parameter: not in the server's query log.
CONTENT_SETTINGS: dict[str, Value] = {"log_queries": 0}

# These only change what a statement costs: a value that a profile has fixed is accepted.
COST = {
    *("max_insert_threads", "optimize_on_insert", "input_format_parallel_parsing", "max_execution_time", "log_queries"),
    *("max_dynamic_subcolumns_in_json_type_parsing", "materialize_skip_indexes_on_insert", "insert_quorum_timeout"),
    "http_write_exception_in_output_format",
}
# These families decide how text is read and written. A setting of theirs that is not listed above and that a profile
# has changed is reset to ClickHouse's default.
_FAMILIES = re.compile(
    r"(input_format_json_|input_format_try_|input_format_null|output_format_json_|type_json_|json_|cast_|variant_|dynamic_throw_|"
    r"analyzer_compatibility_|force_(?!remove)|date_time_)"
)

# What a server without the setting does instead; shown by `doctor`.
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


class Listed(NamedTuple):
    """A setting as the server lists it for our user; `least` and `most` are the bounds of a constraint."""

    value: str
    changed: bool
    fixed: bool
    least: str | None
    most: str | None

    def means(self, value: Value) -> bool:
        """Whether the server has this value already."""
        if value == DEFAULT:
            return not self.changed
        return {"true": "1", "false": "0"}.get(self.value, self.value) == str(value)

    def refuses(self, value: Value) -> bool:
        """Whether our user may not set this value."""
        if self.means(value):
            return False
        return self.fixed or _below(str(value), self.least) or _below(self.most, str(value))


def _below(left: str | None, right: str | None) -> bool:
    try:
        return left is not None and right is not None and float(left) < float(right)
    except ValueError:
        return False


def stated(settings: Mapping[str, Value], listed: Mapping[str, Listed], *, strict: bool = True) -> str:
    """The SETTINGS clause with those of `settings` that the server lists, and what its profile changed in our families.

    With `strict`, settings that our user may not set are in the clause too, and the server refuses them.
    """
    parts = []
    for name, value in settings.items():
        here = listed.get(name)
        if here is None or (here.fixed and here.means(value)):
            continue
        if here.refuses(value) and (not strict or name in COST):
            if not strict or name != "max_execution_time" or here.fixed or here.most is None:
                continue
            value = here.most  # an earlier end is as good
        parts.append(f"{name} = {literal(value)}")
    parts += [
        f"{name} = DEFAULT"
        for name, here in listed.items()
        if here.changed and not here.fixed and name not in settings and _FAMILIES.match(name)
    ]
    return "SETTINGS " + ", ".join(parts) if parts else ""


def refused(settings: Mapping[str, Value], listed: Mapping[str, Listed]) -> dict[str, tuple[Value, str]]:
    """Settings that our user may not set as our statements need them: the value we need, and the server's."""
    return {
        name: (value, here.value)
        for name, value in settings.items()
        if name not in COST and (here := listed.get(name)) is not None and here.refuses(value)
    }


def literal(value: Value) -> str:
    if not isinstance(value, str):
        return str(value)
    if value in ("{}", DEFAULT):  # an empty map
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
