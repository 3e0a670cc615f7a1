"""What a user's YAML files would run is found without running it."""

import pytest

from modtrain.common.errors import DataError
from modtrain.inference.tasks.task_folder import read_task_file


def test_what_a_task_and_its_includes_name_is_found(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "process_docs: !function utils.docs\ndataset_path: pandas\n"
    )
    (tmp_path / "task.yaml").write_text(
        "include: base.yaml\ntask: mine\ndataset_path: json\n"
        "doc_to_text: !function other.text\n"
        "metric_list:\n- metric: acc\n- {metric: glue, hf_evaluate: true}\n"
    )
    named = read_task_file(tmp_path / "task.yaml")
    assert sorted(named.functions) == ["base.yaml: utils.docs", "task.yaml: other.text"]
    assert named.readers == ["pandas"]
    assert sorted(named.metrics) == ["acc", "glue", "hf_evaluate: true"]
    assert named.members == ["mine"]


def test_members_of_groups_are_found_however_they_are_written(tmp_path):
    path = tmp_path / "group.yaml"
    path.write_text("group: all\ntask:\n- one\n- {task: two, num_fewshot: 1}\n- {group: three}\n")
    assert sorted(read_task_file(path).members) == ["all", "one", "three", "two"]


def test_includes_may_form_a_circle(tmp_path):
    for name, other in ("ab", "ba"):
        (tmp_path / f"{name}.yaml").write_text(f"include: {other}.yaml\ntask: {name}\n")
    assert sorted(read_task_file(tmp_path / "a.yaml").members) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("task: !!python/object/apply:os.system [ls]", "no plain YAML"),
        ("a: [" * 30 + "]" * 30, "nested too deeply"),
        ("task: [", "is no YAML"),
        ("", "is empty"),
        ("include: missing.yaml", "is missing"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(content, reason, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        read_task_file(path)


def test_aliases_are_followed_once(tmp_path):
    lines = ["a0: &a0 [!function utils.f]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 15)]
    path = tmp_path / "task.yaml"
    path.write_text("\n".join(lines))
    assert read_task_file(path).functions == ["task.yaml: utils.f"]
