import io

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.parquet_footer import column_values


def written(**options):
    table = pyarrow.table(
        {"a": [1, 2, 3], "b": [[1.0, 2.0], [], [3.0]], "c": ["x", None, "y"], "d": [True, False, None]}
    )
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=2, **options)
    return file


@pytest.mark.parametrize(
    "options",
    [{}, {"version": "1.0"}, {"compression": "zstd", "write_statistics": False}, {"write_page_index": True}],
)
def test_counts_are_those_that_pyarrow_tells(options):
    file = written(**options)
    metadata = pyarrow.parquet.ParquetFile(file).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    expected = [
        (group.column(place).path_in_schema, group.column(place).num_values, group.num_rows)
        for group in groups
        for place in range(group.num_columns)
    ]
    assert list(column_values(file)) == expected


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 4, bytes(100), b"x" * 50 + b"\xff\xff\xff\x7fPAR1"])
def test_what_is_no_parquet_file_is_told(content):
    with pytest.raises(ValueError, match="is no parquet file|has a broken footer"):
        list(column_values(io.BytesIO(content)))


CONTENT = written().getvalue()


@given(st.lists(st.tuples(st.integers(0, len(CONTENT) - 9), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_footer_is_an_error_or_other_numbers(changes):
    content = bytearray(CONTENT)
    for place, byte in changes:
        content[place] = byte
    try:
        assert all(isinstance(values, int) for _, values, _ in column_values(io.BytesIO(content)))
    except ValueError as error:
        assert str(error) in ("is no parquet file", "has a broken footer")
