{{/* Where the model comes from. */}}

{{/* `model.uri`, read: YAML with `kind` (bundled, hub, claim, oci, folder, invalid), `path` (what BATON_MODEL holds) and
     what the kind needs: `repository` and `revision`, `claim`, or `reference`. */}}
{{- define "baton.model" -}}
{{- $uri := .Values.model.uri -}}
{{- if eq $uri "bundled" -}}
kind: bundled
{{- else if regexMatch "^hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+@[A-Za-z0-9_.-]+$" $uri -}}
{{- $parts := splitList "@" (trimPrefix "hf://" $uri) -}}
kind: hub
repository: {{ first $parts | quote }}
revision: {{ last $parts | quote }}
path: {{ printf "/models/%s--%s" (first $parts | replace "/" "--") (last $parts) | quote }}
{{- else if regexMatch "^pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/[A-Za-z0-9_.-]+)*/?$" $uri -}}
{{- $parts := splitn "/" 2 (trimPrefix "pvc://" $uri) -}}
kind: claim
claim: {{ $parts._0 | quote }}
path: {{ printf "/models/%s" (default "" $parts._1) | trimSuffix "/" | quote }}
{{- else if regexMatch "^oci://[^\\s#]+(#/[A-Za-z0-9_./-]*)?$" $uri -}}
{{- $parts := splitn "#" 2 (trimPrefix "oci://" $uri) -}}
kind: oci
reference: {{ $parts._0 | quote }}
path: {{ printf "/models%s" (default "" $parts._1) | trimSuffix "/" | quote }}
{{- else if regexMatch "^/[A-Za-z0-9_./-]+$" $uri -}}
kind: folder
path: {{ $uri | quote }}
{{- else -}}
kind: invalid
{{- end -}}
{{- end -}}

{{/* The variables that name the model, for gateway and workers. */}}
{{- define "baton.modelEnv" -}}
{{- $model := include "baton.model" . | fromYaml -}}
{{- with $model.path }}
- name: BATON_MODEL
  value: {{ . | quote }}
{{- end }}
{{- with coalesce .Values.model.servedName $model.repository }}
- name: BATON_SERVED_MODEL_NAME
  value: {{ . | quote }}
{{- end }}
{{- with int .Values.model.maxLength }}
- name: BATON_MAX_MODEL_LEN
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "baton.modelVolumeMount" -}}
{{- $model := include "baton.model" . | fromYaml -}}
{{- if has $model.kind (list "hub" "claim" "oci") }}
- name: model
  mountPath: /models
  readOnly: true
{{- end }}
{{- end -}}

{{- define "baton.modelVolumes" -}}
{{- $model := include "baton.model" . | fromYaml -}}
{{- if eq $model.kind "claim" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ $model.claim | quote }}
    readOnly: true
{{- else if eq $model.kind "oci" }}
- name: model
  image:
    reference: {{ $model.reference | quote }}
    pullPolicy: {{ .Values.image.pullPolicy }}
{{- else if eq $model.kind "hub" }}
- name: model
  {{- if .Values.model.hub.claim }}
  persistentVolumeClaim:
    claimName: {{ .Values.model.hub.claim | quote }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.model.hub.sizeLimit | quote }}
  {{- end }}
- name: scripts
  configMap:
    name: {{ include "baton.componentName" (dict "root" . "component" "scripts") }}
    defaultMode: 0444
{{- with .Values.model.hub.tokenSecret }}
- name: hub-token
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
    items:
      - key: {{ $.Values.model.hub.tokenKey | quote }}
        path: token
{{- end }}
{{- end }}
{{- end -}}

{{/* The init container that downloads a hub model. Takes (dict "root" $ "values" the component's values "image" reference
     "files" `all`, or `tokenizer` to leave the weights out). */}}
{{- define "baton.modelInitContainers" -}}
{{- $model := include "baton.model" .root | fromYaml -}}
{{- $hub := .root.Values.model.hub -}}
{{- if eq $model.kind "hub" }}
initContainers:
  - name: fetch-model
    image: {{ .image | quote }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [python, /etc/baton/scripts/fetch_model.py]
    env:
      - name: MODEL_REPOSITORY
        value: {{ $model.repository | quote }}
      - name: MODEL_REVISION
        value: {{ $model.revision | quote }}
      - name: MODEL_DIRECTORY
        value: {{ $model.path | quote }}
      - name: MODEL_FILES
        value: {{ .files }}
      - name: HF_HOME
        value: /cache/huggingface
      - name: HF_HUB_DISABLE_TELEMETRY
        value: "1"
      {{- with $hub.endpoint }}
      - name: HF_ENDPOINT
        value: {{ . | quote }}
      {{- end }}
      {{- if $hub.tokenSecret }}
      - name: HF_TOKEN_PATH
        value: /etc/baton/hub-token/token
      {{- end }}
    resources:
      {{- toYaml .values.resources | nindent 6 }}
    securityContext:
      {{- include "baton.containerSecurityContext" . | nindent 6 }}
    volumeMounts:
      - name: model
        mountPath: /models
      - name: scripts
        mountPath: /etc/baton/scripts
        readOnly: true
      {{- if $hub.tokenSecret }}
      - name: hub-token
        mountPath: /etc/baton/hub-token
        readOnly: true
      {{- end }}
      {{- include "baton.scratchVolumeMounts" . | nindent 6 }}
{{- end }}
{{- end -}}
