package nodes

import (
	"slices"
	"strings"
	"time"
	"unicode"
)

// Stage is a step of a boot. The first six are seen by the head itself, the
// others are reported by the node.
type Stage string

const (
	StageDHCP      Stage = "dhcp"      // the firmware's first DISCOVER; begins a timeline
	StageLoader    Stage = "loader"    // boot loader transferred
	StageIPXE      Stage = "ipxe"      // iPXE has a lease and the address of its script
	StageScript    Stage = "script"    // boot script (or pxelinux configuration) transferred
	StageKernel    Stage = "kernel"    // kernel transferred
	StageInitramfs Stage = "initramfs" // initramfs transferred

	StageStage1    Stage = "stage1"    // the init of the initramfs runs
	StageLink      Stage = "link"      // a network link is up
	StageLease     Stage = "lease"     // the node has its own lease
	StageRoot      Stage = "root"      // the NFS root is mounted and checked
	StageInit      Stage = "init"      // krg is PID 1 of the host part
	StageContainer Stage = "container" // the Kerrighed container runs
	StageReady     Stage = "ready"     // sshd answers on port 2222
	StageFailed    Stage = "failed"    // the node sits in its rescue console
	StagePoweroff  Stage = "poweroff"
	StageReboot    Stage = "reboot"
)

// FromNode says whether the stage is one that a node reports of itself; the
// others are the head's own observations and not accepted from outside.
func (s Stage) FromNode() bool {
	switch s {
	case StageStage1, StageLink, StageLease, StageRoot, StageInit, StageContainer,
		StageReady, StageFailed, StagePoweroff, StageReboot:
		return true
	}
	return false
}

// Final says whether nothing more is expected of this boot after the stage.
func (s Stage) Final() bool {
	switch s {
	case StageReady, StageFailed, StagePoweroff, StageReboot:
		return true
	}
	return false
}

// Boot is the timeline of one boot.
type Boot struct {
	Started time.Time `json:"started"`
	Events  []Event   `json:"events"` // by time

	// KernelStart is the estimated start of the node's kernel: the clock of the
	// uptimes that the node reports. Zero before its first report.
	KernelStart time.Time `json:"kernel_start,omitzero"`
}

// Event is one stage of a boot.
type Event struct {
	Stage  Stage     `json:"stage"`
	At     time.Time `json:"at"` // head's clock; for the node's own stages derived from UptimeMS
	Detail string    `json:"detail,omitempty"`

	// UptimeMS is the node's uptime at the stage in milliseconds; 0 for stages
	// seen by the head.
	UptimeMS int64 `json:"uptime_ms,omitempty"`
}

// Since is the time from the start of the boot to event e.
func (b *Boot) Since(e Event) time.Duration { return e.At.Sub(b.Started) }

// Find returns the first event of a stage.
func (b *Boot) Find(s Stage) (Event, bool) {
	if b == nil {
		return Event{}, false
	}
	i := slices.IndexFunc(b.Events, func(e Event) bool { return e.Stage == s })
	if i < 0 {
		return Event{}, false
	}
	return b.Events[i], true
}

// maxEvents bounds a timeline: a node that restarts its container for ever must
// not fill the head's memory.
const maxEvents = 64

// maxDetail bounds the text of an event in bytes.
const maxDetail = 240

// retryWindow is how long a further DISCOVER of a firmware that has shown
// nothing else counts as a retry and not as a new boot.
const retryWindow = 2 * time.Minute

func (b *Boot) clone() Boot {
	c := *b
	c.Events = slices.Clone(b.Events)
	return c
}

// continues says whether a DISCOVER at now belongs to the boot: an iPXE that was
// just loaded asks again, and every firmware repeats itself. Once a script was
// fetched, a firmware that asks has been reset.
func (b *Boot) continues(ipxe bool, now time.Time) bool {
	if b == nil || len(b.Events) == 0 {
		return false
	}
	last := b.Events[len(b.Events)-1]
	if now.Sub(last.At) > retryWindow {
		return false
	}
	switch last.Stage {
	case StageDHCP:
		return true
	case StageLoader, StageIPXE:
		return ipxe
	}
	return false
}

// add puts a stage seen by the head at now into the timeline. A repeated stage
// keeps its first time: the client asked for the file again.
func (b *Boot) add(s Stage, now time.Time, detail string) bool {
	if _, seen := b.Find(s); seen || len(b.Events) >= maxEvents {
		return false
	}
	b.insert(Event{Stage: s, At: now, Detail: Clean(detail)})
	return true
}

// addReported puts a stage reported by the node into the timeline. The node
// knows only its uptime; now minus uptime is an upper bound of the kernel's
// start that gets better with every prompt report, so the smallest one counts.
func (b *Boot) addReported(s Stage, uptime time.Duration, now time.Time, detail string) bool {
	e := Event{Stage: s, UptimeMS: max(uptime.Milliseconds(), 1), Detail: Clean(detail)}
	if slices.ContainsFunc(b.Events, func(o Event) bool { return o.Stage == e.Stage && o.UptimeMS == e.UptimeMS }) {
		return false // a post that was repeated because its answer got lost
	}
	if len(b.Events) >= maxEvents {
		// Keep the story of the boot, give up the oldest of what came after.
		b.Events = slices.Delete(b.Events, maxEvents/2, maxEvents/2+1)
	}
	start := now.Add(-uptime)
	if b.KernelStart.IsZero() || start.Before(b.KernelStart) {
		b.KernelStart = start
		for i, o := range b.Events {
			if o.UptimeMS > 0 {
				b.Events[i].At = start.Add(time.Duration(o.UptimeMS) * time.Millisecond)
			}
		}
	}
	e.At = b.KernelStart.Add(uptime)
	b.insert(e)
	return true
}

func (b *Boot) insert(e Event) {
	b.Events = append(b.Events, e)
	slices.SortStableFunc(b.Events, func(x, y Event) int { return x.At.Compare(y.At) })
}

// newKernel says whether a report belongs to a later boot than this timeline:
// the node's kernel started again without the head having seen its firmware (a
// boot from a stick, or from another PXE server). Ten seconds are allowed for
// reports that were held up.
func (b *Boot) newKernel(s Stage, uptime time.Duration, now time.Time) bool {
	first, seen := b.Find(StageStage1)
	if !seen || s != StageStage1 {
		return false
	}
	return first.UptimeMS != max(uptime.Milliseconds(), 1) && now.Add(-uptime).Sub(b.KernelStart) > 10*time.Second
}

// Clean makes outside text fit for a log line and a terminal: one line, no
// control characters, at most 240 bytes.
func Clean(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case !unicode.IsPrint(r):
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxDetail {
		s = strings.ToValidUTF8(s[:maxDetail-len("…")], "") + "…"
	}
	return strings.TrimSpace(s)
}
