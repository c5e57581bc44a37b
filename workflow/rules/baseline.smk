# Classical reference of Table 2: eGeMAPS functionals and an SVM under the same folds.
rule functionals:
    input:
        utterances=rules.corpus.output.utterances,
    output:
        functionals="<results>/functionals.parquet",
        provenance="<provenance>/functionals.json",
    log:
        "<logs>/functionals.log",
    conda:
        "../../envs/opensmile.yaml"
    resources:
        mem_mb=4_000,
        runtime=120,
    params:
        audio_root=lambda _: AUDIO_ROOT,
        code=code_hash("functionals"),
    shell:
        "python -m gmp_atl functionals --utterances {input.utterances} --audio-root {params.audio_root:q}"
        " --output {output.functionals} --provenance {output.provenance} 2> {log}"


rule baseline:
    input:
        utterances=rules.corpus.output.utterances,
        functionals=rules.functionals.output.functionals,
    output:
        predictions="<results>/evaluations/baseline/fold{fold}/predictions.parquet",
        provenance="<provenance>/baseline/fold{fold}.json",
    log:
        "<logs>/baseline/fold{fold}.log",
    conda:
        "../../envs/faiss.yaml"
    params:
        config=settings("baseline"),
        code=code_hash("baseline"),
    shell:
        "python -m gmp_atl baseline --config {params.config:q} --fold {wildcards.fold}"
        " --utterances {input.utterances} --functionals {input.functionals} --output {output.predictions}"
        " --provenance {output.provenance} 2> {log}"
