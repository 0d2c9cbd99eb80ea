package configs

import (
	"bytes"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"
)

// loginName is what useradd of Debian takes without --badname.
var loginName = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)

// shellPath leaves out what /etc/passwd can't hold.
var shellPath = regexp.MustCompile(`^/[A-Za-z0-9_+./-]*[A-Za-z0-9_+-]$`)

// systemNames are the users and groups that Debian's base-passwd and the
// packages of the root make themselves. A user's group has the user's name, so
// group names count.
var systemNames = strings.Fields(`
	root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc gnats nobody _apt
	systemd-network systemd-timesync systemd-resolve systemd-journal systemd-coredump messagebus dbus polkitd sshd _ssh
	adm tty disk kmem dialout fax voice cdrom floppy tape sudo audio dip operator src shadow utmp video sasl plugdev
	staff users nogroup crontab input sgx clock kvm render netdev tss`)

func (k *checker) users() {
	names, uids := map[string]int{}, map[int]int{}
	for i, u := range k.c.Users {
		row := index("users", i)
		switch {
		case u.Name == "root":
			k.bad(row+".name", "root is always there", "ssh.keys are root's, too; remove this user")
		case slices.Contains(systemNames, u.Name):
			k.bad(row+".name", u.Name+" is a system account of Debian", "choose another name")
		case !loginName.MatchString(u.Name):
			k.bad(row+".name", quote(u.Name)+" is not a login name", "a lower-case letter, then letters, digits, '-' and '_', at most 32, for example alice")
		}
		if u.UID < 1000 || u.UID > 59999 {
			k.bad(row+".uid", fmt.Sprintf("%d is not in 1000..59999", u.UID), "lower ids belong to the system, higher ones to other ranges of Debian")
		}
		if !shellPath.MatchString(u.Shell) || path.Clean(u.Shell) != u.Shell {
			k.bad(row+".shell", quote(u.Shell)+" is not the path of a program", "for example /bin/bash; install others with debian.packages")
		}
		if j, ok := names[u.Name]; ok {
			k.bad(row+".name", fmt.Sprintf("%s is that of users[%d], too", quote(u.Name), j), "remove one of them")
		} else {
			names[u.Name] = i
		}
		if j, ok := uids[u.UID]; ok {
			k.bad(row+".uid", fmt.Sprintf("%d is that of users[%d], too", u.UID, j), "each user needs their own")
		} else {
			uids[u.UID] = i
		}
		k.keys(row+".keys", u.Keys)
	}
	k.keys("ssh.keys", k.c.SSH.Keys)
}

// isControl finds what no editor shows; line ends have a message of their own.
func isControl(r rune) bool {
	return unicode.IsControl(r) && r != '\r' && r != '\n' || r == '\ufeff' || r == '\u2028' || r == '\u2029'
}

// keys checks authorized_keys lines. A message never repeats a key: what was
// pasted by mistake may be secret.
func (k *checker) keys(field string, keys []string) {
	const hint = "paste the one line of a .pub file, for example ssh-ed25519 AAAA... you@host"
	for i, s := range keys {
		at := index(field, i)
		if strings.Contains(s, "PRIVATE KEY") || strings.HasPrefix(s, "PuTTY-User-Key-File") {
			k.bad(at, "this is a private key; it must not be in this file", "remove it, replace the key if the file was shared, and paste the line of the .pub file")
			continue
		}
		if strings.HasPrefix(s, "---- BEGIN SSH2 PUBLIC KEY") {
			k.bad(at, "this is a key in RFC 4716 form", "'ssh-keygen -i -f FILE' prints the line that is needed")
			continue
		}
		if !utf8.ValidString(s) || strings.ContainsFunc(s, isControl) {
			k.bad(at, "holds control characters", hint)
			continue
		}
		if strings.ContainsAny(s, "\r\n") {
			k.bad(at, "holds several lines", "write one key per item")
			continue
		}
		if !strings.Contains(s, " ") && (strings.HasSuffix(s, ".pub") || strings.HasPrefix(s, "~") || strings.HasPrefix(s, "/")) {
			k.bad(at, "looks like the name of a file", hint)
			continue
		}
		key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(s))
		switch {
		case err != nil || len(bytes.TrimSpace(rest)) > 0:
			k.bad(at, "not an SSH public key", hint)
		case key.Type() == "ssh-dss":
			k.bad(at, "DSA keys are refused by OpenSSH since version 10", "make another with 'ssh-keygen -t ed25519'")
		}
	}
}
