{{/* Names, labels and images. */}}

{{/* A name of at most `max` characters: a longer one keeps its start and gets a hash, so that two never become one.
     Takes (dict "name" string "max" int). */}}
{{- define "baton.shorten" -}}
{{- $max := int .max -}}
{{- if gt (len .name) $max -}}
{{- printf "%s-%s" (trunc (int (sub $max 7)) .name | trimSuffix "-") (sha256sum .name | trunc 6) -}}
{{- else -}}
{{- .name -}}
{{- end -}}
{{- end -}}

{{- define "baton.name" -}}
{{- include "baton.shorten" (dict "name" (default .Chart.Name .Values.nameOverride) "max" 63) -}}
{{- end -}}

{{/* Prefix of all names. At most 39 characters: a pod's name is its worker's id, and `-prefill-<hash>-<random>` must fit
     in 64 with it. */}}
{{- define "baton.fullname" -}}
{{- $base := default .Chart.Name .Values.nameOverride -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $base) (contains $base .Release.Name) -}}
{{- end -}}
{{- include "baton.shorten" (dict "name" (replace "." "-" $name) "max" 39) -}}
{{- end -}}

{{/* Name of a component's objects. Takes (dict "root" $ "component" string). */}}
{{- define "baton.componentName" -}}
{{- printf "%s-%s" (include "baton.fullname" .root) .component -}}
{{- end -}}

{{/* What apart from other installations on the same NATS server. */}}
{{- define "baton.clusterName" -}}
{{- $name := default (printf "%s-%s" .Release.Namespace (include "baton.fullname" .)) .Values.clusterName -}}
{{- include "baton.shorten" (dict "name" $name "max" 64) -}}
{{- end -}}

{{/* Labels that never change in the life of an object. Takes (dict "root" $ "component" string). */}}
{{- define "baton.selectorLabels" -}}
app.kubernetes.io/name: {{ include "baton.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selectorLabels" . }}
app.kubernetes.io/part-of: baton
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* `metadata` of an object. Takes (dict "root" $ "component" string), optional "name" and "annotations". */}}
{{- define "baton.metadata" -}}
name: {{ .name | default (include "baton.componentName" .) }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "baton.labels" . | nindent 2 }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Labels of a component's pods: without versions, so that a new chart alone restarts nothing.
     Takes (dict "root" $ "component" string "values" the component's values). */}}
{{- define "baton.podLabels" -}}
{{ include "baton.selectorLabels" . }}
app.kubernetes.io/part-of: baton
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A Baton image. Takes (dict "root" $ "image" the component's image values "repository" the default name). */}}
{{- define "baton.image" -}}
{{- $name := default .repository .image.repository -}}
{{- with .root.Values.image.registry -}}
{{- $name = printf "%s/%s" (trimSuffix "/" .) $name -}}
{{- end -}}
{{- $tag := coalesce .image.tag .root.Values.image.tag .root.Chart.AppVersion -}}
{{- include "baton.imageReference" (dict "name" $name "tag" $tag "digest" .image.digest) -}}
{{- end -}}

{{- define "baton.imageReference" -}}
{{- if .digest -}}
{{- printf "%s@%s" .name .digest -}}
{{- else -}}
{{- printf "%s:%s" .name .tag -}}
{{- end -}}
{{- end -}}

{{- define "baton.serviceAccountName" -}}
{{- if .root.Values.serviceAccount.create -}}
{{- include "baton.componentName" . -}}
{{- else -}}
{{- .root.Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Seconds that a pod gets to end: what each of its steps may take. Takes the component's values. */}}
{{- define "baton.gracePeriod" -}}
{{- add .drain.preStopSeconds .drain.timeoutSeconds .drain.teardownSeconds -}}
{{- end -}}

{{/* Bytes of a size such as 1GiB, 1Gi, 500M or 1e9, as a decimal number. */}}
{{- define "baton.bytes" -}}
{{- $text := toString . | trimSuffix "B" -}}
{{- $number := regexFind "^[0-9.]+(e[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text -}}
{{- $factors := dict "" 1 "k" 1000 "K" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (float64 $number) (get $factors $unit | default 1) | printf "%.0f" -}}
{{- end -}}

{{/* The value of a Secret's key that was generated before, or a new one of 64 hexadecimal digits, in base64.
     Takes (dict "root" $ "name" Secret "key" key). */}}
{{- define "baton.keptSecret" -}}
{{- $existing := lookup "v1" "Secret" .root.Release.Namespace .name -}}
{{- $kept := dig "data" .key "" ($existing | default dict) -}}
{{- if $kept -}}
{{- $kept -}}
{{- else -}}
{{- printf "%x" (randBytes 32 | b64dec) | b64enc -}}
{{- end -}}
{{- end -}}
