{{/* The bus: the chart's own server, or the user's. */}}

{{- define "baton.natsUrl" -}}
{{- if .Values.nats.enabled -}}
{{- printf "nats://%s:4222" (include "baton.componentName" (dict "root" . "component" "nats")) -}}
{{- else -}}
{{- .Values.nats.external.url -}}
{{- end -}}
{{- end -}}

{{/* Secret with the servers' token; empty if they ask for none. */}}
{{- define "baton.natsTokenSecret" -}}
{{- if .Values.nats.enabled -}}
{{- default (include "baton.componentName" (dict "root" . "component" "nats-token")) .Values.nats.auth.existingSecret -}}
{{- else -}}
{{- .Values.nats.external.tokenSecret -}}
{{- end -}}
{{- end -}}

{{- define "baton.natsTokenKey" -}}
{{- if not .Values.nats.enabled -}}
{{- .Values.nats.external.tokenKey -}}
{{- else if .Values.nats.auth.existingSecret -}}
{{- .Values.nats.auth.key -}}
{{- else -}}
nats-token
{{- end -}}
{{- end -}}

{{/* The ports of external servers, as a YAML list. */}}
{{- define "baton.natsExternalPorts" -}}
{{- $ports := list -}}
{{- range splitList "," .Values.nats.external.url -}}
{{- $host := (urlParse (trim .)).host -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" $host | trimPrefix ":" | default "4222" | int) -}}
{{- end -}}
{{- uniq $ports | toYaml -}}
{{- end -}}

{{- define "baton.natsConfig" -}}
port: 4222
# For the kubelet's probes.
http_port: 8222
max_payload: 1MB
# A slow subscriber is cut off; it resynchronises from a snapshot when it is back.
max_pending: 16MB
authorization {
  token: $NATS_TOKEN
}
{{- end -}}
