/* A C-STORE SCP that throws everything away, as fast as it comes: the receiver is never the limit.
 *
 *     cc -O2 -o discard benchmarks/discard.c && ./discard PORT
 *
 * Accepts every presentation context with the first transfer syntax offered for it, PDUs of 128 KiB, any number of
 * associations (a process each), and answers each C-STORE-RQ and C-ECHO-RQ with success. PS3.8 section 9.3, PS3.7
 * section 9.3.1. It trusts its peer: for benchmarks on loopback only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_PDU = 131072, WINDOW = 1 << 20, COMMAND_MAX = 4096 };

static unsigned char window[WINDOW];
static size_t window_begin, window_end;

static void finish(void) { exit(0); }

static unsigned char *take(int fd, size_t count) /* exactly so many bytes, in one piece */
{
    while (window_end - window_begin < count) {
        if (WINDOW - window_begin < count || window_begin == window_end) {
            memmove(window, window + window_begin, window_end - window_begin);
            window_end -= window_begin;
            window_begin = 0;
        }
        ssize_t got = recv(fd, window + window_end, WINDOW - window_end, 0);
        if (got <= 0)
            finish();
        window_end += (size_t)got;
    }
    window_begin += count;
    return window + window_begin - count;
}

static void skip(int fd, size_t count) /* large pieces are read over in place */
{
    while (count) {
        size_t have = window_end - window_begin;
        if (!have) {
            window_begin = window_end = 0;
            ssize_t got = recv(fd, window, WINDOW, 0);
            if (got <= 0)
                finish();
            window_end = (size_t)got;
            have = window_end;
        }
        size_t part = have < count ? have : count;
        window_begin += part;
        count -= part;
    }
}

static void put(int fd, const unsigned char *data, size_t count)
{
    while (count) {
        ssize_t sent = send(fd, data, count, MSG_NOSIGNAL);
        if (sent <= 0)
            finish();
        data += sent;
        count -= (size_t)sent;
    }
}

static uint16_t be16(const unsigned char *at) { return (uint16_t)(at[0] << 8 | at[1]); }
static uint32_t be32(const unsigned char *at) { return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3]; }
static uint16_t le16(const unsigned char *at) { return (uint16_t)(at[1] << 8 | at[0]); }
static uint32_t le32(const unsigned char *at) { return (uint32_t)at[3] << 24 | at[2] << 16 | at[1] << 8 | at[0]; }

static size_t item(unsigned char *out, int kind, const void *value, size_t length)
{
    out[0] = (unsigned char)kind;
    out[1] = 0;
    out[2] = (unsigned char)(length >> 8);
    out[3] = (unsigned char)length;
    memmove(out + 4, value, length);
    return length + 4;
}

static void associate(int fd, uint32_t length)
{
    static unsigned char request[65536], reply[65536];
    if (length > sizeof request)
        finish();
    memcpy(request, take(fd, length), length);
    unsigned char *out = reply + 6;
    memset(out, 0, 68);
    out[1] = 1;
    memcpy(out + 4, request + 4, 32); /* both AE titles */
    out += 68;
    out += item(out, 0x10, "1.2.840.10008.3.1.1.1", 21);
    for (uint32_t at = 68; at + 4 <= length; at += 4 + be16(request + at + 2)) {
        if (request[at] != 0x20)
            continue;
        unsigned char *body = out + 4;
        size_t used = 4, end = at + 4 + be16(request + at + 2);
        body[0] = request[at + 4];
        body[1] = body[2] = body[3] = 0;
        for (size_t in = at + 8; in + 4 <= end; in += 4 + be16(request + in + 2))
            if (request[in] == 0x40) {
                used += item(body + used, 0x40, request + in + 4, be16(request + in + 2));
                break;
            }
        out[0] = 0x21;
        out[1] = 0;
        out[2] = (unsigned char)(used >> 8);
        out[3] = (unsigned char)used;
        out += 4 + used;
    }
    unsigned char user[64], limit[4] = {0, MAX_PDU >> 16 & 255, MAX_PDU >> 8 & 255, MAX_PDU & 255};
    size_t used = item(user, 0x51, limit, 4);
    used += item(user + used, 0x52, "2.25.319044560172834", 20);
    out += item(out, 0x50, user, used);
    uint32_t total = (uint32_t)(out - reply - 6);
    reply[0] = 2;
    reply[1] = 0;
    *(uint32_t *)(reply + 2) = htonl(total);
    put(fd, reply, total + 6);
}

static unsigned char command[COMMAND_MAX];
static size_t command_length;

static unsigned char *element(unsigned char *out, uint16_t number, const unsigned char *value, uint32_t length)
{
    out[0] = out[1] = 0;
    out[2] = (unsigned char)number;
    out[3] = (unsigned char)(number >> 8);
    for (int byte = 0; byte < 4; byte++)
        out[4 + byte] = (unsigned char)(length >> 8 * byte);
    memcpy(out + 8, value, length);
    return out + 8 + length;
}

static void answer(int fd, int context)
{
    const unsigned char *sop_class = command, *instance = command, *id = command;
    uint32_t class_length = 0, instance_length = 0;
    uint16_t field = 0;
    for (size_t at = 0; at + 8 <= command_length; at += 8 + le32(command + at + 4)) {
        const unsigned char *value = command + at + 8;
        switch (le16(command + at + 2)) {
        case 0x0002: sop_class = value, class_length = le32(command + at + 4); break;
        case 0x0100: field = le16(value); break;
        case 0x0110: id = value; break;
        case 0x1000: instance = value, instance_length = le32(command + at + 4); break;
        }
    }
    unsigned char reply[1024], zero[4] = {0}, none[2] = {1, 1};
    unsigned char kind[2] = {(unsigned char)field, (unsigned char)(field >> 8 | 0x80)};
    unsigned char *begin = reply + 12, *out = element(begin, 0, zero, 4);
    out = element(out, 0x0002, sop_class, class_length);
    out = element(out, 0x0100, kind, 2);
    out = element(out, 0x0120, id, 2);
    out = element(out, 0x0800, none, 2);
    out = element(out, 0x0900, zero, 2);
    if (instance_length)
        out = element(out, 0x1000, instance, instance_length);
    uint32_t size = (uint32_t)(out - begin);
    for (int byte = 0; byte < 4; byte++)
        begin[8 + byte] = (unsigned char)((size - 12) >> 8 * byte);
    reply[0] = 4;
    reply[1] = 0;
    *(uint32_t *)(reply + 2) = htonl(size + 6);
    *(uint32_t *)(reply + 6) = htonl(size + 2);
    reply[10] = (unsigned char)context;
    reply[11] = 3;
    put(fd, reply, size + 12);
    command_length = 0;
}

static void p_data(int fd, uint32_t length)
{
    static int waits_for_data;
    while (length) {
        unsigned char head[6];
        memcpy(head, take(fd, 6), 6);
        uint32_t size = be32(head) - 2;
        int is_command = head[5] & 1, is_last = head[5] & 2;
        if (is_command) {
            if (command_length + size > COMMAND_MAX)
                finish();
            memcpy(command + command_length, take(fd, size), size);
            command_length += size;
        } else
            skip(fd, size);
        length -= size + 6;
        if (!is_last)
            continue;
        if (is_command) {
            waits_for_data = 0;
            for (size_t at = 0; at + 8 <= command_length; at += 8 + le32(command + at + 4))
                if (le16(command + at + 2) == 0x0800)
                    waits_for_data = le16(command + at + 8) != 0x0101;
        }
        if (!is_command || !waits_for_data)
            answer(fd, head[4]);
    }
}

static void serve(int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    for (;;) {
        unsigned char head[6];
        memcpy(head, take(fd, 6), 6);
        uint32_t length = be32(head + 2);
        if (head[0] == 1)
            associate(fd, length);
        else if (head[0] == 4)
            p_data(fd, length);
        else if (head[0] == 5) {
            put(fd, (const unsigned char[10]){6, 0, 0, 0, 0, 4}, 10);
            finish();
        } else
            finish();
    }
}

int main(int count, char **values)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    if (count != 2)
        return fputs("usage: discard PORT\n", stderr), 2;
    address.sin_port = htons((uint16_t)atoi(values[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 128))
        return perror("discard"), 1;
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        /* Waited for, and not ignored: only then does the system count their CPU time as ours. */
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        if (fd < 0)
            continue;
        if (!fork()) {
            close(listener);
            serve(fd);
        }
        close(fd);
    }
}
