{{/* What a schema cannot say: values that contradict each other, and keys that are elsewhere. All problems at once. */}}
{{- define "baton.validate" -}}
{{- $found := dict "problems" list -}}
{{- $values := .Values -}}
{{- include "baton.validate.names" (dict "found" $found "root" .) -}}
{{- include "baton.validate.model" (dict "found" $found "root" .) -}}
{{- include "baton.validate.nats" (dict "found" $found "root" .) -}}
{{- range $name := list "gateway" "prefill" "decode" -}}
{{- include "baton.validate.component" (dict "found" $found "name" $name "values" (get $values $name)) -}}
{{- end -}}
{{- range $name := list "prefill" "decode" -}}
{{- include "baton.validate.pool" (dict "found" $found "name" $name "values" (get $values $name)) -}}
{{- end -}}
{{- if hasKey $values.gateway.apiKeys "keys" -}}
{{- include "baton.problem" (dict "found" $found "text" "gateway.apiKeys.keys: values end up in the release's history, so keys come from a Secret only; set gateway.apiKeys.existingSecret") -}}
{{- end -}}
{{- if ne (empty $values.tls.gatewaySecret) (empty $values.tls.workerSecret) -}}
{{- include "baton.problem" (dict "found" $found "text" "tls: gatewaySecret and workerSecret belong together: all processes have certificates, or none has") -}}
{{- end -}}
{{- if and $values.gateway.tls.clientCASecret (not $values.gateway.tls.existingSecret) -}}
{{- include "baton.problem" (dict "found" $found "text" "gateway.tls.clientCASecret: needs gateway.tls.existingSecret, the gateway's own certificate") -}}
{{- end -}}
{{- if eq (int $values.gateway.service.port) (int $values.gateway.service.grpcPort) -}}
{{- include "baton.problem" (dict "found" $found "text" (printf "gateway.service: port and grpcPort are both %v" $values.gateway.service.port)) -}}
{{- end -}}
{{- if $found.problems -}}
{{- fail (printf "\nthese values cannot be used:\n- %s" (join "\n- " $found.problems)) -}}
{{- end -}}
{{- end -}}

{{- define "baton.problem" -}}
{{- $_ := set .found "problems" (append .found.problems .text) -}}
{{- end -}}

{{- define "baton.validate.names" -}}
{{- $fullname := include "baton.fullname" .root -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $fullname) -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "names would begin with %q, but a Service's name begins with a letter and has only a-z, 0-9 and '-'; set fullnameOverride" $fullname)) -}}
{{- end -}}
{{- if and .root.Values.serviceAccount.create .root.Values.serviceAccount.name -}}
{{- include "baton.problem" (dict "found" .found "text" "serviceAccount.name: names an existing account, so it needs serviceAccount.create=false") -}}
{{- end -}}
{{- if not (or .root.Values.serviceAccount.create .root.Values.serviceAccount.name) -}}
{{- include "baton.problem" (dict "found" .found "text" "serviceAccount.create=false: needs serviceAccount.name") -}}
{{- end -}}
{{- end -}}

{{- define "baton.validate.model" -}}
{{- $kind := (include "baton.model" .root | fromYaml).kind -}}
{{- if eq $kind "invalid" -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "model.uri: %q is none of bundled, hf://org/name@revision, pvc://claim/path, oci://image#/path, /path" .root.Values.model.uri)) -}}
{{- end -}}
{{- if and (eq $kind "oci") (semverCompare "<1.31.0-0" .root.Capabilities.KubeVersion.Version) -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "model.uri: image volumes need Kubernetes 1.31 or later, this is %s" .root.Capabilities.KubeVersion.Version)) -}}
{{- end -}}
{{- range list "tokenSecret" "endpoint" "claim" -}}
{{- if and (get $.root.Values.model.hub .) (not (has $kind (list "hub" "invalid"))) -}}
{{- include "baton.problem" (dict "found" $.found "text" (printf "model.hub.%s: only for an hf:// model, but model.uri is %q" . $.root.Values.model.uri)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.validate.nats" -}}
{{- $nats := .root.Values.nats -}}
{{- if and $nats.enabled (or $nats.external.url $nats.external.tokenSecret) -}}
{{- include "baton.problem" (dict "found" .found "text" "nats.external: set, but nats.enabled=true installs a server; choose one") -}}
{{- end -}}
{{- if not (or $nats.enabled $nats.external.url) -}}
{{- include "baton.problem" (dict "found" .found "text" "nats.enabled=false: needs nats.external.url") -}}
{{- end -}}
{{- if and (not $nats.enabled) $nats.auth.existingSecret -}}
{{- include "baton.problem" (dict "found" .found "text" "nats.auth.existingSecret: for the installed server, but nats.enabled=false; set nats.external.tokenSecret") -}}
{{- end -}}
{{- end -}}

{{/* Gateway and pools. Takes (dict "found" dict "name" string "values" the component's values). */}}
{{- define "baton.validate.component" -}}
{{- if hasKey .values "terminationGracePeriodSeconds" -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "%s.terminationGracePeriodSeconds: is the sum of preStopSeconds, timeoutSeconds and teardownSeconds in %s.drain; set those" .name .name)) -}}
{{- end -}}
{{- if and .values.image.tag .values.image.digest -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "%s.image: tag and digest are both set; choose one" .name)) -}}
{{- end -}}
{{- $zero := list "0" "0%" -}}
{{- if and (has (toString .values.rollout.maxSurge) $zero) (has (toString .values.rollout.maxUnavailable) $zero) -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "%s.rollout: with maxSurge and maxUnavailable both 0 no pod could ever be replaced" .name)) -}}
{{- end -}}
{{- if lt (int .values.probes.startupSeconds) (int .values.probes.periodSeconds) -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "%s.probes: startupSeconds (%v) is less than periodSeconds (%v)" .name .values.probes.startupSeconds .values.probes.periodSeconds)) -}}
{{- end -}}
{{- end -}}

{{- define "baton.validate.pool" -}}
{{- $gpu := .values.gpu.resourceName -}}
{{- $memory := dig "limits" "memory" "" (.values.resources | default dict) -}}
{{- range $section := list "requests" "limits" -}}
{{- if hasKey (get ($.values.resources | default dict) $section | default dict) $gpu -}}
{{- include "baton.problem" (dict "found" $.found "text" (printf "%s.resources.%s: asks for %s; set %s.device=cuda and %s.gpu.count instead" $.name $section $gpu $.name $.name)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .values.device "cpu") $memory -}}
{{- if ge (include "baton.bytes" .values.kvCacheMemory | float64) (include "baton.bytes" $memory | float64) -}}
{{- include "baton.problem" (dict "found" .found "text" (printf "%s.kvCacheMemory: %s does not fit in the container's memory limit of %s, where the model must fit as well" .name .values.kvCacheMemory $memory)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
