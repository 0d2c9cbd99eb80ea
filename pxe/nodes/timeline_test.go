package nodes

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// story prints a boot as "dhcp+0s loader+1s".
func story(n Node) string {
	if n.Boot == nil {
		return "none"
	}
	var parts []string
	for _, e := range n.Boot.Events {
		parts = append(parts, fmt.Sprintf("%s+%v", e.Stage, n.Boot.Since(e)))
	}
	return strings.Join(parts, " ")
}

func TestTimeline(t *testing.T) {
	type step func(*Registry, *clock)
	pass := func(d time.Duration) step { return func(_ *Registry, c *clock) { c.pass(d) } }
	asks := func(ipxe bool) step { return func(r *Registry, _ *clock) { r.Discovering(macA, ipxe, "") } }
	saw := func(s Stage) step { return func(r *Registry, _ *clock) { r.Saw(macA, s, "") } }
	reports := func(s Stage, up time.Duration) step {
		return func(r *Registry, _ *clock) {
			if err := r.Report(macA, s, up, ""); err != nil {
				panic(err)
			}
		}
	}
	second := pass(time.Second)
	for _, tt := range []struct {
		name  string
		steps []step
		want  string
	}{
		{"never booted", nil, "none"},
		{"a firmware repeats itself", []step{asks(false), second, asks(false), second, asks(false)}, "dhcp+0s"},
		{"UEFI by way of the loader", []step{
			asks(false), second, saw(StageLoader), second, asks(true), asks(true), saw(StageIPXE), second, saw(StageScript),
			saw(StageKernel), saw(StageKernel), second, saw(StageInitramfs),
		}, "dhcp+0s loader+1s ipxe+2s script+3s kernel+3s initramfs+4s"},
		{"reset after the script", []step{asks(true), saw(StageIPXE), saw(StageScript), second, asks(true)}, "dhcp+0s"},
		{"reset while the loader was loaded", []step{asks(false), saw(StageLoader), second, asks(false), second, saw(StageLoader)}, "dhcp+0s loader+1s"},
		{"an old beginning is no beginning", []step{asks(false), pass(time.Hour), asks(false), second, saw(StageLoader)}, "dhcp+0s loader+1s"},
		{"late reports fall into their place", []step{
			asks(true), second, saw(StageScript), second, saw(StageInitramfs), // kernel starts at 3 s
			pass(11 * time.Second), reports(StageLease, 9*time.Second), // 1 s late
			reports(StageStage1, 2*time.Second), reports(StageLink, 4*time.Second),
			second, reports(StageRoot, 11*time.Second), // prompt
		}, "dhcp+0s script+1s initramfs+2s stage1+5s link+7s lease+12s root+14s"},
		{"a repeated report is one", []step{
			asks(true), pass(5 * time.Second), reports(StageStage1, time.Second), reports(StageStage1, time.Second),
		}, "dhcp+0s stage1+5s"},
		{"no firmware seen", []step{pass(time.Minute), reports(StageStage1, 5*time.Second), second, reports(StageLink, 6*time.Second)}, "stage1+5s link+6s"},
		{"and reset", []step{
			reports(StageStage1, 5*time.Second), reports(StageReady, 9*time.Second),
			pass(time.Hour), reports(StageStage1, 4*time.Second),
		}, "stage1+4s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClock()
			r, err := Open(Config{Cluster: cluster(), File: filepath.Join(t.TempDir(), "n.json"), Now: c.Now})
			if err != nil {
				t.Fatal(err)
			}
			assign(t, r, macA, 1)
			for _, s := range tt.steps {
				s(r, c)
			}
			n, _ := r.Lookup(macA)
			if got := story(n); got != tt.want {
				t.Errorf("\n got %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestTimelineIsBounded(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "n.json"), cluster(), nil)
	assign(t, r, macA, 1)
	r.Discovering(macA, true, "")
	for i := range 10 * maxEvents {
		if err := r.Report(macA, StageContainer, time.Duration(i)*time.Second, ""); err != nil {
			t.Fatal(err)
		}
	}
	n, _ := r.Lookup(macA)
	if len(n.Boot.Events) != maxEvents {
		t.Errorf("%d events, want %d", len(n.Boot.Events), maxEvents)
	}
	if _, ok := n.Boot.Find(StageDHCP); !ok {
		t.Error("the beginning of the boot was given up")
	}
}

func TestReportRefuses(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "n.json"), cluster(), nil)
	assign(t, r, macA, 1)
	for _, err := range []error{
		r.Report(macA, StageKernel, 0, ""),
		r.Report(macA, "made up", 0, ""),
		r.Report(macA, StageReady, -1, ""),
		r.Report(macA, StageReady, 1<<62, ""),
		r.Report(macB, StageReady, 0, ""),
	} {
		if err == nil {
			t.Error("accepted")
		}
	}
}

func TestLoaderAge(t *testing.T) {
	c := newClock()
	r, err := Open(Config{Cluster: cluster(), File: filepath.Join(t.TempDir(), "n.json"), Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	assign(t, r, macA, 1)
	if _, ok := r.LoaderAge(macA); ok {
		t.Error("a loader that was never fetched has an age")
	}
	r.Discovering(macA, true, "")
	r.Saw(macA, StageLoader, "")
	c.pass(3 * time.Second)
	if age, ok := r.LoaderAge(macA); !ok || age != 3*time.Second {
		t.Errorf("age %v %v", age, ok)
	}
	r.Saw(macA, StageScript, "")
	r.Discovering(macA, true, "")
	if _, ok := r.LoaderAge(macA); ok {
		t.Error("the loader of an earlier boot counts")
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"eth0 1000 Mb/s":         "eth0 1000 Mb/s",
		"a\nb\x1b[31mred\x00":    "a b[31mred",
		"\xff\xfe":               "?",
		" été ":                  "été",
		strings.Repeat("é", 200): strings.Repeat("é", 118) + "…",
	} {
		if got := Clean(in); got != want || !utf8.ValidString(got) || len(got) > maxDetail {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
}
