{{/* A pool of workers. Prefill and decode come from the same template and differ by their values only.
     Takes (dict "root" $ "component" role "values" the pool's values "peer" the other role). */}}
{{- define "baton.worker.deployment" -}}
{{- $image := include "baton.image" (dict "root" .root "image" .values.image "repository" (printf "baton-worker-%s" .values.device)) -}}
{{- $affinity := include "baton.worker.affinity" . | fromYaml -}}
{{- $model := include "baton.model" .root | fromYaml -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  replicas: {{ .values.replicas }}
  revisionHistoryLimit: 3
  progressDeadlineSeconds: {{ include "baton.progressDeadline" . }}
  strategy:
    {{- include "baton.rollout" .values.rollout | nindent 4 }}
  selector:
    matchLabels:
      {{- include "baton.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "baton.podLabels" . | nindent 8 }}
      annotations:
        {{- if eq $model.kind "hub" }}
        checksum/scripts: {{ .root.Files.Get "files/fetch_model.py" | sha256sum }}
        {{- end }}
        kubectl.kubernetes.io/default-container: worker
        {{- with .values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      {{- include "baton.podBase" . | nindent 6 }}
      {{- with .values.runtimeClassName }}
      runtimeClassName: {{ . | quote }}
      {{- end }}
      {{- include "baton.scheduling" (merge (dict "affinity" $affinity) .) | trim | nindent 6 }}
      terminationGracePeriodSeconds: {{ include "baton.gracePeriod" .values }}
      {{- with include "baton.modelInitContainers" (dict "root" .root "values" .values "image" $image "files" "all") | trim }}{{ . | nindent 6 }}{{ end }}
      containers:
        - name: worker
          image: {{ $image | quote }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          args: [{{ .component }}]
          env:
            {{- include "baton.mergeEnv" (dict "env" (include "baton.worker.env" .) "extra" .values.extraEnv "where" (printf "%s.extraEnv" .component)) | nindent 12 }}
          ports:
            - name: grpc
              containerPort: 9000
            - name: kv
              containerPort: 9001
          {{- include "baton.worker.probes" . | nindent 10 }}
          lifecycle:
            preStop:
              sleep:
                seconds: {{ .values.drain.preStopSeconds }}
          resources:
            {{- include "baton.worker.resources" .values | nindent 12 }}
          securityContext:
            {{- include "baton.containerSecurityContext" . | nindent 12 }}
          volumeMounts:
            {{- include "baton.scratchVolumeMounts" . | nindent 12 }}
            - name: shm
              mountPath: /dev/shm
            {{- include "baton.secretVolumeMounts" .root | nindent 12 }}
            {{- with include "baton.tlsVolumeMounts" . | trim }}{{ . | nindent 12 }}{{ end }}
            {{- with include "baton.modelVolumeMount" .root | trim }}{{ . | nindent 12 }}{{ end }}
            {{- with .values.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        {{- include "baton.scratchVolumes" . | nindent 8 }}
        - name: shm
          emptyDir:
            medium: Memory
            sizeLimit: {{ .values.shmSize | quote }}
        {{- include "baton.secretVolumes" .root | nindent 8 }}
        {{- with include "baton.tlsVolumes" . | trim }}{{ . | nindent 8 }}{{ end }}
        {{- with include "baton.modelVolumes" .root | trim }}{{ . | nindent 8 }}{{ end }}
        {{- with .values.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end -}}

{{- define "baton.worker.env" -}}
{{- include "baton.commonEnv" . }}
- name: BATON_PORT
  value: "9000"
- name: BATON_KV_PORT
  value: "9001"
- name: BATON_WORKER_ID
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: BATON_ADVERTISE_HOST
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: BATON_DEVICE
  value: {{ .values.device }}
- name: BATON_DTYPE
  value: {{ .root.Values.model.dtype }}
- name: BATON_TRANSPORT
  value: {{ .root.Values.engine.transport }}
- name: BATON_BLOCK_SIZE
  value: {{ .root.Values.engine.blockSize | quote }}
- name: BATON_PREFIX_CACHING
  value: {{ .root.Values.engine.prefixCaching | quote }}
- name: BATON_SESSION_CACHE_SHARE
  value: {{ .root.Values.engine.sessionCacheShare | quote }}
- name: BATON_STUCK_AFTER_S
  value: {{ .root.Values.engine.stuckAfterSeconds | quote }}
- name: BATON_KV_CACHE_MEMORY
  value: {{ .values.kvCacheMemory | quote }}
- name: BATON_MAX_NUM_SEQS
  value: {{ int64 .values.maxNumSeqs | quote }}
- name: BATON_MAX_NUM_BATCHED_TOKENS
  value: {{ int64 .values.maxNumBatchedTokens | quote }}
{{- $cpus := "" }}
{{- range list "limits" "requests" }}
{{- if dig . "cpu" "" ($.values.resources | default dict) }}{{ $cpus = . }}{{ end }}
{{- end }}
{{- if int .values.threads }}
- name: BATON_THREADS_PER_WORKER
  value: {{ .values.threads | quote }}
{{- else if $cpus }}
# Rounded up to whole CPUs.
- name: BATON_THREADS_PER_WORKER
  valueFrom:
    resourceFieldRef:
      containerName: worker
      resource: {{ $cpus }}.cpu
      divisor: "1"
{{- end }}
{{- if eq .values.device "cuda" }}
- name: TRITON_CACHE_DIR
  value: /cache/triton
{{- end }}
{{- end -}}

{{/* Three questions: is the model loaded (startup), does the process still step (liveness: never a peer's health, or one
     dead pool would take the other with it), should it get work (readiness: not while it drains). */}}
{{- define "baton.worker.probes" -}}
{{- $probes := .values.probes -}}
{{- $ready := include "baton.worker.ask" (dict "context" . "service" "ready") -}}
startupProbe:
  {{- $ready | nindent 2 }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ divf $probes.startupSeconds $probes.periodSeconds | ceil | int }}
livenessProbe:
  {{- include "baton.worker.ask" (dict "context" . "service" "") | nindent 2 }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ $probes.livenessFailures }}
readinessProbe:
  {{- $ready | nindent 2 }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ $probes.readinessFailures }}
{{- end -}}

{{/* A kubelet's own gRPC probe knows no TLS; with it the container asks itself. */}}
{{- define "baton.worker.ask" -}}
{{- if include "baton.tlsSecret" .context -}}
exec:
  command: [python, -m, baton.services.healthcheck, grpc{{ with .service }}, {{ . }}{{ end }}]
{{- else -}}
grpc:
  port: 9000
  {{- with .service }}
  service: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "baton.worker.resources" -}}
{{- $resources := deepCopy (.resources | default dict) -}}
{{- if eq .device "cuda" -}}
{{- $_ := set $resources "limits" (merge (dict .gpu.resourceName (int .gpu.count)) ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "baton.worker.affinity" -}}
{{- with .root.Values.engine.affinityTopologyKey -}}
podAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 50
      podAffinityTerm:
        topologyKey: {{ . | quote }}
        labelSelector:
          matchLabels:
            {{- include "baton.selectorLabels" (dict "root" $.root "component" $.peer) | nindent 12 }}
{{- end -}}
{{- end -}}

{{/* Headless: the gateways learn workers' addresses from the bus; this gives people and tools a name for them. */}}
{{- define "baton.worker.service" -}}
apiVersion: v1
kind: Service
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  clusterIP: None
  selector:
    {{- include "baton.selectorLabels" . | nindent 4 }}
  ports:
    - name: grpc
      port: 9000
      targetPort: grpc
      {{- if not .root.Values.tls.workerSecret }}
      appProtocol: kubernetes.io/h2c
      {{- end }}
    - name: kv
      port: 9001
      targetPort: kv
{{- end -}}

{{/* Workers take commands from gateways and blocks from each other. */}}
{{- define "baton.worker.networkPolicy" -}}
{{- if .root.Values.networkPolicy.enabled -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "baton.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    - from:
        - podSelector:
            matchLabels:
              {{- include "baton.selectorLabels" (dict "root" .root "component" "gateway") | nindent 14 }}
      ports:
        - port: grpc
    - from:
        {{- include "baton.workerPeers" .root | trim | nindent 8 }}
      ports:
        - port: grpc
        - port: kv
  egress:
    - to:
        {{- include "baton.workerPeers" .root | trim | nindent 8 }}
      ports:
        - port: grpc
        - port: kv
    {{- include "baton.commonEgress" .root | nindent 4 }}
{{- end -}}
{{- end -}}

{{- define "baton.workerPeers" -}}
{{- range list "prefill" "decode" }}
- podSelector:
    matchLabels:
      {{- include "baton.selectorLabels" (dict "root" $ "component" .) | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Names, the bus, and the hub when models come from there. */}}
{{- define "baton.commonEgress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- if .Values.nats.enabled }}
- to:
    - podSelector:
        matchLabels:
          {{- include "baton.selectorLabels" (dict "root" . "component" "nats") | nindent 10 }}
  ports:
    - port: client
{{- else }}
- ports:
    {{- range include "baton.natsExternalPorts" . | fromYamlArray }}
    - port: {{ . }}
    {{- end }}
{{- end }}
{{- if eq (include "baton.model" . | fromYaml).kind "hub" }}
# The init container's download.
- ports:
    - port: 443
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}
