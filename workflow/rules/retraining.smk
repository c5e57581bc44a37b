# Stage 3: HuBERT predicts the GMPs of masked frames; it depends on fold, seed and layer, not on the loss after it.
rule retraining:
    input:
        utterances=rules.corpus.output.utterances,
        features=rules.local_features.output.features,
        encoder=start_of_retraining,
        labels=codebooks(rules.clustering.output.labels, retrained_with),
    output:
        config="<results>/retraining/{variant}/fold{fold}/seed{seed}/layer{layer}/config.json",
        encoder="<results>/retraining/{variant}/fold{fold}/seed{seed}/layer{layer}/model.safetensors",
        history="<histories>/retraining/{variant}/fold{fold}/seed{seed}/layer{layer}.parquet",
        provenance="<provenance>/retraining/{variant}/fold{fold}/seed{seed}/layer{layer}.json",
    log:
        "<logs>/retraining/{variant}/fold{fold}/seed{seed}/layer{layer}.log",
    benchmark:
        "<benchmarks>/retraining/{variant}/fold{fold}/seed{seed}/layer{layer}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=16_000,
        runtime=720,
    params:
        config=settings("retraining"),
        encoder=subpath(input.encoder, parent=True),
        folder=subpath(output.encoder, parent=True),
        code=code_hash("retraining"),
    shell:
        "python -m gmp_atl retraining --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --layer {wildcards.layer} --fold {wildcards.fold} --seed {wildcards.seed} --utterances {input.utterances}"
        " --local-features {input.features} --encoder {params.encoder} --pseudo-labels {input.labels}"
        " --output {params.folder} --history {output.history}"
        " --checkpoint {params.folder}/checkpoint.safetensors --provenance {output.provenance} 2> {log}"
