package live

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/nfsroot/debian/space"
)

func parseAccounts(passwd, shadow, group, gshadow string) *accounts {
	return &accounts{
		passwd:  parseTable(passwd, passwdFields),
		shadow:  parseTable(shadow, shadowFields),
		group:   parseTable(group, groupFields),
		gshadow: parseTable(gshadow, gshadowFields),
	}
}

const (
	freshPasswd  = "root:x:0:0::/root:/bin/bash\nsshd:x:999:65534::/run/sshd:/usr/sbin/nologin\nnobody:x:65534:65534::/:/usr/sbin/nologin\n"
	freshShadow  = "root:*:20000:0:99999:7:::\nsshd:!*:20000::::::\n"
	freshGroup   = "root:x:0:\nadm:x:4:\nsudo:x:27:\n"
	freshGshadow = "root:*::\nadm:*::\nsudo:*::\n"
)

func fresh() *accounts { return parseAccounts(freshPasswd, freshShadow, freshGroup, freshGshadow) }

func TestCarryOver(t *testing.T) {
	for _, test := range []struct {
		name            string
		old             *accounts
		mine            *accounts
		passwd, shadow  string // lines that must be there
		group           string
		kept, conflicts []string // in order; conflicts by a part
		absent          string   // must be in none of the tables
	}{
		{
			name:   "account with group and password",
			old:    parseAccounts("ann:x:1002:1002::/home/ann:/bin/zsh\n", "ann:$y$h:1:0:9:7:::\n", "ann:x:1002:\n", "ann:!::\n"),
			mine:   fresh(),
			passwd: "ann:x:1002:1002::/home/ann:/bin/zsh", shadow: "ann:$y$h:1:0:9:7:::", group: "ann:x:1002:",
			kept: []string{"account ann"},
		},
		{
			name:   "password of a configured account and of root",
			old:    parseAccounts("root:x:0:0::/root:/bin/sh\nkrg:x:1000:1000::/home/krg:/bin/bash\n", "root:$6$r:1::::::\nkrg:$6$k:2::::::\n", "", ""),
			mine:   parseAccounts(freshPasswd+"krg:x:1000:1000::/home/krg:/bin/bash\n", freshShadow+"krg:*:::::::\n", freshGroup, freshGshadow),
			passwd: "root:x:0:0::/root:/bin/bash", shadow: "krg:$6$k:2::::::",
		},
		{
			name:   "locked by the administrator stays locked",
			old:    parseAccounts("krg:x:1000:1000::/home/krg:/bin/bash\n", "krg:!$6$k:2::::::\n", "", ""),
			mine:   parseAccounts("krg:x:1000:1000::/home/krg:/bin/bash\n", "krg:*:::::::\n", "", ""),
			passwd: "krg:x:1000", shadow: "krg:!$6$k:2::::::",
		},
		{
			name:   "system accounts stay the new root's",
			old:    parseAccounts("sshd:x:998:1::/:/bin/sh\nweird:x:500:500::/:/bin/sh\n", "sshd:$6$x:::::::\nweird:$6$y:::::::\n", "weird:x:500:\n", ""),
			mine:   fresh(),
			passwd: "sshd:x:999:65534", shadow: "sshd:!*:20000::::::", absent: "weird",
		},
		{
			name:      "uid taken",
			old:       parseAccounts("bob:x:1000:1000::/home/bob:/bin/sh\n", "bob:$6$b:::::::\n", "bob:x:1000:\n", ""),
			mine:      parseAccounts("krg:x:1000:1000::/home/krg:/bin/sh\n", "krg:*:::::::\n", "krg:x:1000:\n", ""),
			passwd:    "krg:x:1000",
			conflicts: []string{"account bob was not kept", "group bob was not kept"}, absent: "bob",
		},
		{
			name:   "uid changed in the configuration",
			old:    parseAccounts("krg:x:1000:1000::/home/krg:/bin/sh\n", "krg:$6$k:::::::\n", "", ""),
			mine:   parseAccounts("krg:x:1005:1005::/home/krg:/bin/sh\n", "krg:*:::::::\n", "", ""),
			passwd: "krg:x:1005", shadow: "krg:$6$k:",
			conflicts: []string{"krg has the uid 1005 now"},
		},
		{
			name:   "memberships",
			old:    parseAccounts("ann:x:1002:1002::/home/ann:/bin/sh\n", "", "sudo:x:27:ann,ghost,sshd\nlab:x:2000:ann\n", "sudo:*::ann\n"),
			mine:   fresh(),
			passwd: "ann:x:1002", group: "sudo:x:27:ann",
			kept: []string{"account ann", "group lab"}, absent: "ghost",
		},
		{
			name:   "lines that are no accounts",
			old:    parseAccounts("# comment\n+::::::\n\nbroken\nx:y:z\na:x:notanumber:1::/:/\n:x:1001:1::/:/\n", "\n", "::\n", ""),
			mine:   fresh(),
			passwd: "root:x:0:0", absent: "notanumber",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			kept, conflicts := test.mine.carryOver(test.old)
			if !slices.Equal(kept, test.kept) {
				t.Errorf("kept %q, want %q", kept, test.kept)
			}
			if len(conflicts) != len(test.conflicts) {
				t.Errorf("conflicts: %q", conflicts)
			}
			for i := range min(len(conflicts), len(test.conflicts)) {
				if !strings.Contains(conflicts[i], test.conflicts[i]) {
					t.Errorf("conflict %q, want %q", conflicts[i], test.conflicts[i])
				}
			}
			all := ""
			for _, f := range test.mine.files() {
				all += "\n" + f.table.String()
			}
			for _, want := range []string{test.passwd, test.shadow, test.group} {
				if !strings.Contains(all, "\n"+want) {
					t.Errorf("%q is missing in %s", want, all)
				}
			}
			if test.absent != "" && strings.Contains(all, test.absent) {
				t.Errorf("%q is in %s", test.absent, all)
			}
			test.mine.carryOver(test.old)
			again := ""
			for _, f := range test.mine.files() {
				again += "\n" + f.table.String()
			}
			if again != all {
				t.Errorf("the second time changed %s\nto %s", all, again)
			}
		})
	}
}

func TestConfigure(t *testing.T) {
	users := []configs.User{{Name: "krg", UID: 1000}, {Name: "eve", UID: 1001, Shell: "/bin/sh"}}
	a := fresh()
	if gone, err := a.configure(users, nil); err != nil || len(gone) > 0 {
		t.Fatal(gone, err)
	}
	for table, want := range map[*table]string{
		&a.passwd:  freshPasswd + "krg:x:1000:1000::/home/krg:/bin/bash\neve:x:1001:1001::/home/eve:/bin/sh\n",
		&a.shadow:  freshShadow + "krg:*::0:99999:7:::\neve:*::0:99999:7:::\n",
		&a.group:   freshGroup + "krg:x:1000:\neve:x:1001:\n",
		&a.gshadow: freshGshadow + "krg:!::\neve:!::\n",
	} {
		if got := table.String(); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
	// A password that was set stays; a changed shell is taken.
	a.shadow.find("eve")[1] = "$6$hash"
	a.addMembers("sudo", []string{"krg", "eve"})
	users[1].Shell = "/bin/bash"
	gone, err := a.configure(users[1:], []string{"krg", "eve"})
	if err != nil || !slices.Equal(gone, []string{"krg"}) {
		t.Errorf("%v %v", gone, err)
	}
	if text := a.passwd.String() + a.shadow.String() + a.group.String() + a.gshadow.String(); strings.Contains(text, "krg") ||
		!strings.Contains(text, "eve:$6$hash:") || !strings.Contains(text, "/home/eve:/bin/bash") || !strings.Contains(text, "sudo:x:27:eve\n") {
		t.Errorf("%s", text)
	}
	for _, bad := range [][]configs.User{
		{{Name: "mallory", UID: 1001}}, // eve's
		{{Name: "sshd", UID: 1002}},    // a system account
	} {
		if _, err := a.configure(bad, nil); err == nil || !strings.Contains(err.Error(), "fix:") {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add(freshPasswd, freshShadow, freshGroup, freshGshadow)
	f.Add("a:x:1000:1000::/home/a:/bin/sh\n+\n#\n::::::", "a:$:::::::", "a:x:1000:a,,b\n", "\x00:\n")
	f.Fuzz(func(t *testing.T, passwd, shadow, group, gshadow string) {
		old := parseAccounts(passwd, shadow, group, gshadow)
		for _, file := range old.files() {
			// Parsing and printing changes nothing but a missing last line end.
			again := parseTable(file.table.String(), file.width)
			if again.String() != file.table.String() {
				t.Fatalf("%s is not stable", file.name)
			}
		}
		if got := old.passwd.String(); strings.TrimSuffix(got, "\n") != strings.TrimSuffix(passwd, "\n") {
			t.Fatalf("%q became %q", passwd, got)
		}
		mine := fresh()
		mine.carryOver(old)
		before := mine.passwd.String() + mine.shadow.String() + mine.group.String() + mine.gshadow.String()
		mine.carryOver(old)
		if after := mine.passwd.String() + mine.shadow.String() + mine.group.String() + mine.gshadow.String(); after != before {
			t.Fatalf("not idempotent:\n%q\n%q", before, after)
		}
		for _, l := range mine.passwd.lines {
			if l.id() == 0 && l.fields[0] != "root" {
				t.Fatalf("a second root: %q", l.fields)
			}
		}
		_, _ = mine.configure([]configs.User{{Name: "krg", UID: 1000}}, []string{"gone"})
	})
}

func TestKeyFileIsOneKeyALine(t *testing.T) {
	got := string(keyFile([]string{" ssh-ed25519 A a ", "ssh-ed25519 A a", "ssh-ed25519 B b\nssh-ed25519 EVIL", ""}))
	if lines := strings.Split(strings.TrimSpace(got), "\n"); len(lines) != 3 || strings.HasPrefix(lines[2], "ssh-ed25519 EVIL") {
		t.Errorf("%q", got)
	}
}

// TestFullDisk: the image does not fit; what was live stays.
func TestFullDisk(t *testing.T) {
	needRoot(t)
	in := testInput(t)
	dir := in.State
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=512k"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	first := mustSync(t, in)
	in.Image.Base = archive(t, item{name: "etc/"}, item{name: "etc/big", text: strings.Repeat("x", 1<<20)})
	_, err := Sync(t.Context(), in, nil)
	var full *space.Error
	if !errors.As(err, &full) || full.Mount != dir {
		t.Fatalf("%v", err)
	}
	if live, _ := filepath.EvalSymlinks(filepath.Join(dir, "root/live")); live != first.Dir {
		t.Errorf("live is %s", live)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "root", "2-*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}
