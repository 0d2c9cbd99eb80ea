package admission

import (
	"errors"
	"maps"
	"strconv"
	"time"

	"krgimage/services/identity"
)

// reasons name why something was refused, for counters.
var reasons = []struct {
	err  error
	name string
}{
	{ErrAlive, "alive"},
	{ErrNotAdmitted, "not_admitted"},
	{ErrUnprivileged, "unprivileged"},
	{identity.ErrUnknown, "token_unknown"},
	{identity.ErrUsed, "token_used"},
	{identity.ErrTokenExpired, "token_expired"},
	{identity.ErrWrongAddress, "token_wrong_machine"},
	{identity.ErrForeign, "foreign"},
	{identity.ErrWrongSession, "wrong_session"},
	{identity.ErrWrongRole, "wrong_role"},
	{identity.ErrExpired, "expired"},
	{identity.ErrNotYetValid, "not_yet_valid"},
	{identity.ErrStale, "stale"},
	{identity.ErrRevoked, "revoked"},
	{identity.ErrMalformed, "malformed"},
}

// Other is the Reason of errors that are no refusals: of the store, for example.
const Other = "other"

// Reason names an error as Refused counts it.
func Reason(err error) string {
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.name
		}
	}
	return Other
}

// Refused is how much was refused since the start, by reason; every reason is
// there, also those at zero.
func (d *Desk) Refused() map[string]uint64 {
	all := map[string]uint64{Other: 0}
	for _, r := range reasons {
		all[r.name] = 0
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.Copy(all, d.refused)
	return all
}

// quieting is a line that is not repeated for a while.
type quieting struct {
	since   time.Time
	skipped int
}

// quietFor is how long a refusal of one machine for one reason is logged once.
const (
	quietFor   = time.Minute
	maxQuieted = 1024
)

// Refuse counts and logs a refusal: what was refused, to whom (as far as known;
// Node is -1 if it isn't), and why. Others who refuse members call it, too.
func (d *Desk) Refuse(what string, whom identity.Binding, why error) {
	reason, now := Reason(why), d.cfg.Now()
	kind := what + "/" + reason + "/" + whom.MAC + "/" + strconv.Itoa(whom.Node)
	d.mu.Lock()
	d.refused[reason]++
	q, seen := d.quiet[kind]
	if seen && now.Sub(q.since) < quietFor && !now.Before(q.since) {
		q.skipped++
		d.quiet[kind] = q
		d.mu.Unlock()
		return
	}
	if len(d.quiet) >= maxQuieted { // outsiders can make up names: forget rather than grow
		clear(d.quiet)
	}
	d.quiet[kind] = quieting{since: now}
	d.mu.Unlock()
	args := []any{"what", what, "reason", reason, "err", why}
	if whom.Node >= 0 {
		args = append(args, "node", whom.Node)
	}
	if whom.MAC != "" {
		args = append(args, "mac", whom.MAC, "address", whom.Address)
	}
	if q.skipped > 0 {
		args = append(args, "not_logged", q.skipped)
	}
	d.log.Warn("refused", args...)
}
