{{/* Parts that the pods of gateway and workers share. */}}

{{- define "baton.podSecurityContext" -}}
runAsNonRoot: true
{{- with .root.Values.security.runAsUser }}
runAsUser: {{ int64 . }}
{{- end }}
{{- with .root.Values.security.runAsGroup }}
runAsGroup: {{ int64 . }}
{{- end }}
{{- with .root.Values.security.fsGroup }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "baton.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The fields of a pod that are the same for every component. Service links are off because a Service's variables, such
     as BATON_PORT for one named `baton`, would be read as options. Takes (dict "root" $ "component" string). */}}
{{- define "baton.podBase" -}}
serviceAccountName: {{ include "baton.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "baton.podSecurityContext" . | nindent 2 }}
{{- end -}}

{{/* Where pods go. Takes (dict "root" $ "component" string "values" the component's values), optional "affinity". */}}
{{- define "baton.scheduling" -}}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity | default .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- with .values.topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "baton.selectorLabels" . | nindent 8 }}
{{- end }}
{{- end -}}

{{/* Variables of every Baton process. Takes (dict "root" $ "values" the component's values). */}}
{{- define "baton.commonEnv" -}}
- name: BATON_CLUSTER
  value: {{ include "baton.clusterName" .root | quote }}
- name: BATON_NATS_URL
  value: {{ include "baton.natsUrl" .root | quote }}
{{- if include "baton.natsTokenSecret" .root }}
- name: BATON_NATS_TOKEN_FILE
  value: /etc/baton/nats-token/token
{{- end }}
- name: BATON_BLOCK_KEY_FILE
  value: /etc/baton/block-key/block-key
- name: BATON_HOST
  value: {{ .root.Values.bindAddress | quote }}
{{- if not (include "baton.listensWithTLS" .) }}
# Who may connect is the NetworkPolicy's to say.
- name: BATON_ALLOW_INSECURE_BIND
  value: "true"
{{- end }}
{{- if include "baton.tlsSecret" . }}
- name: BATON_TLS_CERT_FILE
  value: /etc/baton/tls/tls.crt
- name: BATON_TLS_KEY_FILE
  value: /etc/baton/tls/tls.key
- name: BATON_TLS_CA_FILE
  value: /etc/baton/tls/ca.crt
{{- end }}
- name: BATON_DRAIN_TIMEOUT_S
  value: {{ .values.drain.timeoutSeconds | quote }}
- name: BATON_PEER_TIMEOUT_S
  value: {{ .root.Values.peerTimeoutSeconds | quote }}
- name: BATON_LOG_LEVEL
  value: {{ .root.Values.logLevel }}
- name: BATON_LOG_FORMAT
  value: json
{{- include "baton.modelEnv" .root }}
# The model is in place when the process starts: nothing is to be looked up.
- name: HF_HUB_OFFLINE
  value: "1"
- name: HF_HOME
  value: /cache/huggingface
{{- end -}}

{{/* The Secret with the certificate that a component shows to the others. Takes a context with "root" and "component". */}}
{{- define "baton.tlsSecret" -}}
{{- ternary .root.Values.tls.gatewaySecret .root.Values.tls.workerSecret (eq .component "gateway") -}}
{{- end -}}

{{/* Whether what a component listens on for others speaks TLS. */}}
{{- define "baton.listensWithTLS" -}}
{{- ternary .root.Values.gateway.tls.existingSecret (include "baton.tlsSecret" .) (eq .component "gateway") -}}
{{- end -}}

{{- define "baton.tlsVolumeMounts" -}}
{{- if include "baton.tlsSecret" . }}
- name: tls
  mountPath: /etc/baton/tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "baton.tlsVolumes" -}}
{{- with include "baton.tlsSecret" . }}
- name: tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- end -}}

{{/* The chart's variables and the user's. Takes (dict "env" YAML list "extra" list "where" the values' path). */}}
{{- define "baton.mergeEnv" -}}
{{- $names := list -}}
{{- range .env | fromYamlArray -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- range .extra -}}
{{- if has .name $names -}}
{{- fail (printf "\n%s: %s is set by the chart; change the value that it comes from" $.where .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- .env -}}
{{- with .extra }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Room to write in: the root file system is read-only. */}}
{{- define "baton.scratchVolumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: cache
  mountPath: /cache
{{- end -}}

{{- define "baton.scratchVolumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
- name: cache
  emptyDir:
    sizeLimit: 10Gi
{{- end -}}

{{/* The Secrets of every Baton process: the one that keys block names, and the token of the NATS servers. */}}
{{- define "baton.secretVolumeMounts" -}}
- name: block-key
  mountPath: /etc/baton/block-key
  readOnly: true
{{- if include "baton.natsTokenSecret" . }}
- name: nats-token
  mountPath: /etc/baton/nats-token
  readOnly: true
{{- end }}
{{- end -}}

{{- define "baton.secretVolumes" -}}
- name: block-key
  secret:
    secretName: {{ include "baton.blockKeySecret" . | quote }}
    defaultMode: 0444
    items:
      - key: {{ include "baton.blockKeyKey" . | quote }}
        path: block-key
{{- with include "baton.natsTokenSecret" . }}
- name: nats-token
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
    items:
      - key: {{ include "baton.natsTokenKey" $ | quote }}
        path: token
{{- end }}
{{- end -}}

{{- define "baton.blockKeySecret" -}}
{{- default (include "baton.componentName" (dict "root" . "component" "block-key")) .Values.blockKey.existingSecret -}}
{{- end -}}

{{- define "baton.blockKeyKey" -}}
{{- ternary .Values.blockKey.key "block-key" (not (empty .Values.blockKey.existingSecret)) -}}
{{- end -}}

{{/* A rollout must not be called failed while pods still have time to end, to download and to start.
     Takes (dict "root" $ "values" the component's values). */}}
{{- define "baton.progressDeadline" -}}
{{- $hub := eq (include "baton.model" .root | fromYaml).kind "hub" -}}
{{- add .values.probes.startupSeconds (include "baton.gracePeriod" .values | int) (ternary .root.Values.model.hub.downloadSeconds 0 $hub) 60 -}}
{{- end -}}

{{- define "baton.rollout" -}}
type: RollingUpdate
rollingUpdate:
  maxSurge: {{ .maxSurge }}
  maxUnavailable: {{ .maxUnavailable }}
{{- end -}}

{{/* Takes (dict "root" $ "component" string "values" the component's values). */}}
{{- define "baton.podDisruptionBudget" -}}
{{- if and .values.podDisruptionBudget.enabled (gt (int .values.replicas) 1) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  # A pod that is broken anyway does not keep its node from being drained.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "baton.selectorLabels" . | nindent 6 }}
{{- end -}}
{{- end -}}

{{/* Takes (dict "root" $ "component" string). */}}
{{- define "baton.serviceAccount" -}}
{{- if .root.Values.serviceAccount.create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "baton.metadata" (merge (dict "annotations" .root.Values.serviceAccount.annotations) .) | nindent 2 }}
automountServiceAccountToken: false
{{- end -}}
{{- end -}}
