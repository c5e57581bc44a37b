# GMP-ATL, fold by fold, from audio to tables. See README.md and config.yaml.
from snakemake.utils import min_version

min_version("9.14")


configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/corpus.smk"
include: "workflow/rules/features.smk"
include: "workflow/rules/multitask.smk"
include: "workflow/rules/clustering.smk"
include: "workflow/rules/retraining.smk"
include: "workflow/rules/finetuning.smk"
include: "workflow/rules/examples.smk"
include: "workflow/rules/baseline.smk"
include: "workflow/rules/tables.smk"


if CONFIG.pretraining:

    include: "workflow/rules/pretraining.smk"


rule all:
    default_target: True
    input:
        rules.tables.output,
        rules.figures.output,
