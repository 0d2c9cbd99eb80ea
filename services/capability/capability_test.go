package capability

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNumbers(t *testing.T) {
	if Supported != 0o1067 {
		t.Errorf("supported %#o, want 01067", Supported)
	}
	for c, name := range map[Cap]string{0: "CHANGE_KERRIGHED_CAP", 1: "CAN_MIGRATE", 2: "DISTANT_FORK", 4: "CHECKPOINTABLE",
		5: "USE_REMOTE_MEMORY", 9: "SEE_LOCAL_PROC_STAT", 10: "DEBUG"} {
		if c.String() != name {
			t.Errorf("%d is %s, want %s", c, c, name)
		}
	}
}

func TestShow(t *testing.T) {
	const want = "Permitted Capabilities: 01067\n" +
		"\tCHANGE_KERRIGHED_CAP, CAN_MIGRATE, DISTANT_FORK, CHECKPOINTABLE\n\tUSE_REMOTE_MEMORY, SEE_LOCAL_PROC_STAT\n" +
		"Effective Capabilities: 01\n\tCHANGE_KERRIGHED_CAP\n" +
		"Inheritable Permitted Capabilities: 01067\n" +
		"\tCHANGE_KERRIGHED_CAP, CAN_MIGRATE, DISTANT_FORK, CHECKPOINTABLE\n\tUSE_REMOTE_MEMORY, SEE_LOCAL_PROC_STAT\n" +
		"Inheritable Effective Capabilities: 01\n\tCHANGE_KERRIGHED_CAP\n"
	if got := Initial().String(); got != want {
		t.Errorf("got\n%s", got)
	}
	if got := (Sets{}).String(); !strings.HasPrefix(got, "Permitted Capabilities: 00\n\nEffective") {
		t.Errorf("empty sets:\n%s", got)
	}
}

func TestParse(t *testing.T) {
	const old = Mask(0o23)
	for _, tc := range []struct {
		text    string
		want    Mask
		unknown string
	}{
		{"010", 0o10, ""}, {"0x10", 0x10, ""}, {"16", 16, ""}, {"0", 0, ""}, {"+3", 3, ""}, {"01067", 0o1067, ""},
		{"+CAN_MIGRATE", old, ""},
		{"+DISTANT_FORK,USE_REMOTE_MEMORY", old | 0o44, ""},
		{"-CAN_MIGRATE,CHECKPOINTABLE", 1, ""},
		{"CAN_MIGRATE", 2, ""},
		{"DEBUGx", 1 << 10, ""},
		{"+CAP_DEBUG,CAN_MIGRATE", old, "CAP_DEBUG"},
		{"can_migrate", 0, "can_migrate"},
		{"", 0, ""}, {"+", old, ""}, {"-", old, ""},
		{"099", 0, "099"}, {"0b1", 0, "0b1"}, {"1_0", 0, "1_0"}, {"99999999999", 0, "99999999999"},
	} {
		got, unknown := Parse(old, tc.text)
		if got != tc.want || strings.Join(unknown, " ") != tc.unknown {
			t.Errorf("%q: %#o %q, want %#o %q", tc.text, got, unknown, tc.want, tc.unknown)
		}
	}
	for m := range Mask(1 << count) {
		if got, _ := Parse(0, m.Octal()); got != m {
			t.Fatalf("%s comes back as %#o", m.Octal(), got)
		}
		if got, unknown := Parse(0, strings.Join(m.Names(), ",")); got != m || unknown != nil {
			t.Fatalf("%s comes back as %#o, %q", m.Names(), got, unknown)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("+CAN_MIGRATE,x")
	f.Add("010")
	f.Fuzz(func(t *testing.T, text string) {
		m, unknown := Parse(Supported, text)
		for _, line := range strings.Split(m.List(), "\n") {
			if len(line) >= screen {
				t.Errorf("%q: a line of %d columns", text, len(line))
			}
		}
		if slices.Contains(unknown, "") {
			t.Errorf("%q: an empty name is unknown", text)
		}
	})
}

func TestFork(t *testing.T) {
	s := Sets{Permitted: 0o67, Effective: 0o7, InheritablePermitted: 0o23, InheritableEffective: 0o7}
	want := Sets{Permitted: 0o23, Effective: 0o3, InheritablePermitted: 0o23, InheritableEffective: 0o7}
	if got := s.Fork(); got != want {
		t.Errorf("got %+v", got)
	}
	if got := Initial().Fork(); got != Initial() {
		t.Errorf("a child of the first process has %+v", got)
	}
}

func TestChange(t *testing.T) {
	full := Initial()
	with := func(f func(*Sets)) Sets { s := full; f(&s); return s }
	locked := with(func(s *Sets) { s.Effective = 0 })
	for name, tc := range map[string]struct {
		have, want Sets
		denied     bool
		busy       Busy
		err        error
		got        Sets
	}{
		"nothing new":      {have: full, want: full, got: full},
		"children fork":    {have: full, want: with(func(s *Sets) { s.InheritableEffective |= 4 }), got: with(func(s *Sets) { s.InheritableEffective |= 4 })},
		"effective > p":    {have: full, want: with(func(s *Sets) { s.Permitted = 1; s.InheritablePermitted = 1; s.Effective = 3 }), err: unix.EINVAL},
		"inh perm > p":     {have: full, want: with(func(s *Sets) { s.Permitted = 1 }), err: unix.EINVAL},
		"inh eff > inh p":  {have: full, want: with(func(s *Sets) { s.InheritablePermitted = 1; s.InheritableEffective = 2 }), err: unix.EINVAL},
		"unsupported":      {have: full, want: with(func(s *Sets) { s.Permitted |= 1 << 10 }), err: unix.ENOSYS},
		"inval before sys": {have: full, want: with(func(s *Sets) { s.Effective |= 1 << 10 }), err: unix.EINVAL},
		"another's":        {have: full, want: full, denied: true, err: unix.EPERM},
		"no right":         {have: locked, want: full, err: unix.EPERM},
		"in use":           {have: with(func(s *Sets) { s.Effective = 3 }), want: full, busy: 2, err: unix.EBUSY},
		"in use, stays":    {have: with(func(s *Sets) { s.Effective = 3 }), want: with(func(s *Sets) { s.Effective = 3 }), busy: 2, got: with(func(s *Sets) { s.Effective = 3 })},
		"nothing regained": {
			have: Sets{Permitted: 3, Effective: 1, InheritablePermitted: 3, InheritableEffective: 1},
			want: Sets{Permitted: 7, Effective: 7, InheritablePermitted: 7, InheritableEffective: 7},
			got:  Sets{Permitted: 3, Effective: 3, InheritablePermitted: 3, InheritableEffective: 3},
		},
	} {
		got, err := tc.have.Change(tc.want, !tc.denied, tc.busy)
		if !errors.Is(err, tc.err) {
			t.Errorf("%s: %v, want %v", name, err, tc.err)
		}
		if err != nil {
			tc.got = tc.have
		}
		if got != tc.got {
			t.Errorf("%s: %+v, want %+v", name, got, tc.got)
		}
	}
}
